"""`prepare`: text -> tokens; `cluster`: windows -> clusters; `weigh`: what a domain asks of the clusters."""

from __future__ import annotations

import click

from mlx_slm.cli.common import PLACE, SIZE, Session, common
from mlx_slm.errors import SlmError


@click.command()
@click.argument("name")
@click.argument("sources", nargs=-1)
@click.option("--field", help="The field that holds the text. [default: text]")
@click.option("--limit", type=SIZE, help="Stop after this many bytes of training text, such as 500M.")
@click.option("--strict", is_flag=True, help="Fail on invalid UTF-8 instead of replacing it.")
@click.option("--fresh", is_flag=True, help="Rebuild it, even if its inputs changed.")
@click.option(
    "--drop-near-duplicates",
    "drop",
    is_flag=True,
    help="Leave training documents out that resemble an earlier one or a held-out one; held-out ones always stay.",
)
@common
def prepare(session: Session, name, sources, drop, **how) -> None:
    """Read the text of set NAME, split it by document, and tokenise it.

    A SOURCE is a file, a glob, a directory, hf:OWNER/DATASET[@REVISION][:CONFIG] or docs:<package>[,<package>...]; with
    train=, valid= or test= in front it is that split. Files: txt md jsonl csv tsv (also .gz, .zst), parquet. Behind a
    source on the Hub, ?split=validation takes another split of it than train, ?files=data/*.gz other files, and
    ?FIELD=VALUE only such records; & joins them. The generic set comes first: the tokenizer is trained on it.
    """
    from mlx_slm.text import prepare as work
    from mlx_slm.text.store import Store

    if drop:
        session.overrides = (*session.overrides, "data.drop_near_duplicates=true")
    named = work.sources_of(name, list(sources), session.workspace, session.config)
    made = work.prepare(session.project, work.Preparation(name, named, **how))
    stores = {split: Store(session.workspace.data(name, split)) for split in work.SPLITS}
    result = {
        "set": name,
        "made": made,
        "splits": {
            s: {"documents": t.num_documents, "tokens": t.num_tokens, "bytes": t.num_bytes} for s, t in stores.items()
        },
    }

    def text() -> None:
        if not made:
            session.report.line(f"{name} is up to date")
        rows = [[s, *(f"{n:,}" for n in (t.num_documents, t.num_tokens, t.num_bytes))] for s, t in stores.items()]
        session.report.table(f"{name} in {session.workspace.root}", ["split", "documents", "tokens", "bytes"], rows)

    session.show(result, text)


@click.command()
@click.option("--k", "counts", type=click.IntRange(1), multiple=True, help="Number of clusters; may be repeated.")
@click.option("--encoder", help="lsi, static, a directory, or a repository on the Hub. [default: clusters.encoder]")
@click.option("--show", is_flag=True, help="List the clusters and draw the histograms into results/.")
@click.option("--fresh", is_flag=True, help="Cluster again, even if the inputs changed.")
@common
def cluster(session: Session, counts, encoder, show, fresh) -> None:
    """Embed the windows of the generic set, cluster them, and assign every prepared set to the clusters.

    A killed run goes on where it stopped; what is there already is kept.
    """
    from mlx_slm.clustering import show as shows
    from mlx_slm.clustering.clusters import ensure_clusters
    from mlx_slm.machine.ranks import ranks

    if encoder:
        session.overrides = (*session.overrides, f"clusters.encoder={encoder}")
    config, workspace = session.config, session.workspace
    session.start_computing()
    sets = [name for name in workspace.sets() if name != config.data.generic]
    made = ensure_clusters(session.project, list(counts) or [config.clusters.k], sets, fresh)
    show = show and ranks().is_first
    summaries = [shows.summary(clusters, config.data.generic, sets) for clusters in made]
    if show:
        for clusters, facts in zip(made, summaries, strict=True):
            shows.add_details(facts, workspace, clusters, config.data.generic, sets)
            facts["figure"] = str(shows.draw(facts, workspace.results))

    def text() -> None:
        for facts in summaries:
            columns, rows = shows.table_of(facts, detailed=show)
            session.report.table(f"{facts['k']:,} clusters of {config.data.generic}", columns, rows)
            if show:
                session.report.line(f"figure: {facts['figure']}")

    session.show({"clusters": summaries}, text)


@click.command()
@click.option("--domain", required=True, help="The set whose text the weights shall make likely.")
@click.option("--from", "source", required=True, type=PLACE, metavar="RUN", help="A projected network or a mixture.")
@click.option("--tokens", type=SIZE, help="Use this many tokens of the domain, such as 1M. [default: all]")
@click.option("--out", type=PLACE, metavar="FILE", help="[default: weights-<domain>-<run>.yaml in results/]")
@common
def weigh(session: Session, domain, source, tokens, out) -> None:
    """Learn weights of the clusters from a domain's text, for `pretrain --method is --weights FILE`.

    They make a mixture of the experts' predictions likeliest on the domain set (its first finetuning.select_tokens
    tokens), where importance sampling otherwise takes the domain's histogram over the clusters.
    """
    from pathlib import Path

    import yaml

    from mlx_slm.experts.bundle import find_source
    from mlx_slm.experts.experts import Experts, has_experts
    from mlx_slm.finetuning.domain import domain_set
    from mlx_slm.finetuning.weights import learnt_weights
    from mlx_slm.storage.records import write_text

    session.start_computing()
    project = session.project
    run = find_source(session.workspace, source)
    if not has_experts(run):
        raise SlmError(
            f"--from {source}: run {run.name} has no experts: weights are learnt from a network or a mixture"
        )
    learnt = learnt_weights(project, Experts(session.workspace, run), domain_set(project, domain, tokens, []))
    path = Path(out) if out else session.workspace.results / f"weights-{domain}-{run.label}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(learnt, sort_keys=False))
    heaviest = sorted(learnt["weights"].items(), key=lambda item: -item[1])[:5]

    def text() -> None:
        named = ", ".join(f"{cluster}: {share:.0%}" for cluster, share in heaviest)
        session.report.line(
            f"{learnt['nll']:.4f} nats a token by the mixture, {learnt['best_expert_nll']:.4f} by the best expert "
            f"alone; the heaviest clusters: {named}\nweights: {path}\n"
            f"next: mlx-slm pretrain --method is --weights {path} --k {learnt['k']}"
        )

    session.show(learnt | {"path": str(path)}, text)


COMMANDS = (prepare, cluster, weigh)
