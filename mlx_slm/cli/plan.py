"""`plan` and `study`."""

from __future__ import annotations

import click

from mlx_slm.cli.common import HOURS, PLACE, SIZE, Session, common


@click.command()
@click.option("--generic-hours", type=HOURS, help="Hours of this machine for pretraining, shared by all domains.")
@click.option("--specialization-hours", type=HOURS, help="At most this many hours per domain. [default: no limit]")
@click.option("--sampling-hours", type=HOURS, help="Of them for an SLM-is. [default: a fifth of --generic-hours]")
@click.option("--domains", type=click.IntRange(1), default=1, show_default=True, help="How many domains there will be.")
@click.option("--domain-tokens", type=SIZE, default="1M", show_default=True, help="Text that a domain has.")
@click.option("--inference-parameters", type=SIZE, help="The largest model that may be run. [default: the small one]")
@click.option("--inference-speed", type=HOURS, help="Tokens per second that it must write on this machine.")
@click.option("--domain", help="Show the perplexities that were recorded on this set's test text.")
@common
def plan(session: Session, domain, **given) -> None:
    """Which method to use, and what each costs on this machine, before anything is trained.

    Hours come from recorded runs of the same models on this machine, or from a short measurement.
    """
    from mlx_slm.planning.plan import Budgets, make_plan

    if given["inference_parameters"] and given["inference_speed"]:
        raise click.UsageError("give --inference-parameters or --inference-speed, not both")
    config = session.config
    given["generic_hours"] = given["generic_hours"] or config.training.hours
    if not given["generic_hours"]:
        raise click.UsageError("give --generic-hours: the configuration's horizon is not in hours")
    session.start_computing()
    budgets = Budgets(**given)
    result = make_plan(session.project, budgets, domain)

    def text() -> None:
        rows = [
            [
                ("→ " if row["method"] == result["recommended"] else "  ") + row["method"],
                f"{row['pretraining_tokens'] / 1e6:,.3g}M" if row["pretraining_tokens"] else "-",
                *(f"{row[key]:,.3g}" for key in ("generic_hours", "specialization_hours", "total_hours")),
                f"{row['inference_parameters']:,}",
                f"{row['memory_gb']:.1f}",
                "yes" if row["fits"] else "no",
                _perplexity(row),
            ]
            for row in result["methods"]
        ]
        columns = [
            "method",
            "pretraining tokens",
            "generic h",
            "h a domain",
            "total h",
            "parameters run",
            "GB",
            "fits",
            "perplexity",
        ]
        title = f"Hours on {result['device']}, {budgets.domains} domain{'s' if budgets.domains > 1 else ''} of "
        title += f"{budgets.domain_tokens:,} tokens"
        session.report.table(title, columns, rows)
        rates = "; ".join(f"{name}: {source}" for name, source in result["rates_from"].items())
        session.report.line(f"rates: {rates}")
        session.report.line(f"\nrecommended: {result['recommended']}: {result['reason']}")

    session.show(result, text)


def _perplexity(row: dict) -> str:
    """With where it comes from."""
    from mlx_slm.fields import format_size

    if row["perplexity"] is None:
        return "-"
    return f"{row['perplexity']:.1f} ({row['source']}, {format_size(row['perplexity_tokens'])})"


@click.command()
@click.argument("configuration", type=PLACE, metavar="CONFIG")
@click.option(
    "--jobs",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="This many processes share the cells, each on its part of the cores, each with memory as if it were alone. "
    "On a CPU with small models one per core is fastest.",
)
@common
def study(session: Session, configuration, jobs) -> None:
    """Compare methods: grids of budgets, domains, sizes of the domain set and seeds.

    CONFIG is a YAML file or a shipped name with a section `study`. A killed study goes on with the next cell. Writes
    results/NAME.jsonl, NAME.md and figures.
    """
    from pathlib import Path

    from mlx_slm.storage.records import write_text
    from mlx_slm.study.cell import Study
    from mlx_slm.study.figures import draw
    from mlx_slm.study.run import run_study
    from mlx_slm.study.tables import markdown

    if session.config_name:
        raise click.UsageError("a study's CONFIG is its configuration: leave --config out")
    session.config_name = configuration
    name, results = Path(configuration).stem, session.workspace.results
    session.start_computing()
    overrides = [part for override in session.overrides for part in ("--set", override)]
    command = ["study", configuration, "--workspace", str(session.workspace.root), "--yes", *overrides]
    cells = Study(session.project, name)
    rows = run_study(cells, jobs, command)
    tables = markdown(rows, name, cells.histograms())
    write_text(results / f"{name}.md", tables)
    figures = [str(path) for path in draw(rows, name, results)]
    result = {"study": name, "rows": rows, "tables": str(results / f"{name}.md"), "figures": figures}

    def text() -> None:
        session.report.line(tables)
        session.report.line("\n".join(["figures:", *figures]))

    session.show(result, text)


COMMANDS = (plan, study)
