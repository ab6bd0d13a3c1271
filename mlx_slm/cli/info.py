"""`info`: the machine, a configuration's models, and the health of a workspace."""

from __future__ import annotations

import click

from mlx_slm.cli.common import Session, common

PAPER = {"model": ("SLM", "126M"), "large": ("LLM", "771M")}
PAPER_NETWORK = {16: "756M", 32: "1,422M", 64: "2,770M"}


@click.command()
@click.argument("run", required=False)
@click.option("--verify", is_flag=True, help="Check every byte of every artifact in the workspace.")
@common
def info(session: Session, run, verify) -> None:
    """Show backend, device, memory, BLAS with its measured speed, versions, and the models of a configuration.

    With a RUN of method pn: how alike its experts' coefficients are, layer by layer, against how alike their clusters
    are, in numbers and as a figure in results/.
    """
    from mlx_slm.machine import runtime
    from mlx_slm.models.projected import ProjectedShape
    from mlx_slm.models.shape import Shape

    if run:
        _show_experts(session, run)
        return

    result = runtime.describe()
    session.start_computing()
    config = session.config
    shapes = {
        section: Shape.of(getattr(config, section), config.tokenizer.vocab_size, config.data.context_length)
        for section in PAPER
    }
    result["models"] = [
        {"section": section, "family": shape.family, "parameters": shape.num_parameters, "paper": PAPER[section][1]}
        for section, shape in shapes.items()
    ]
    network = ProjectedShape.of(config.projection, shapes["model"])
    of_network = {"section": "projection", "family": shapes["model"].family, "parameters": network.num_parameters}
    result["models"].append(of_network | {"paper": PAPER_NETWORK.get(network.k, "")})
    if verify:
        result["verified"] = _verify(session)

    def text() -> None:
        lines = [
            f"backend   {result['backend']}",
            f"device    {result['device']}",
            f"memory    {result['memory_gb']} GB",
            f"matmul    {result['gflops']:,.0f} GFLOP/s",
        ]
        if result["blas"]:
            lines.append(f"BLAS      {result['blas']}")
        if result["blas_measured"]:
            measured = ", ".join(f"{name} {value:,.0f}" for name, value in result["blas_measured"].items())
            lines.append(f"          measured once, GFLOP/s in the shapes of a training step: {measured}")
        lines.append("versions  " + ", ".join(f"{name} {version}" for name, version in result["versions"].items()))
        session.report.line("\n".join(lines))
        rows = [[f"{m['section']} ({m['family']})", f"{m['parameters']:,}", m["paper"]] for m in result["models"]]
        title = f"Parameters at vocabulary {config.tokenizer.vocab_size:,}, context {config.data.context_length:,}"
        session.report.table(title, ["model", "parameters", "the paper's"], rows)

    session.show(result, text)


def _show_experts(session: Session, name: str) -> None:
    from mlx_slm.errors import SlmError
    from mlx_slm.experts.bundle import find_source
    from mlx_slm.experts.experts import Experts, has_experts
    from mlx_slm.experts.geometry import draw, geometry
    from mlx_slm.storage.workspace import Workspace

    run = find_source(session.workspace, name)
    if not has_experts(run):
        raise SlmError(f"run {run.name} has no experts to compare; name a run of method pn")
    facts = geometry(Experts(Workspace(run.path) if run.is_handed_over else session.workspace, run))
    facts["figure"] = str(draw(facts, session.workspace.results))

    def text() -> None:
        keys = ("cosine", "spread", "correlation")
        rows = [
            [f"layer {one['layer']}", *("-" if one[key] is None else f"{one[key]:.3f}" for key in keys)]
            for one in facts["layers"]
        ]
        columns = ["coefficients c = E M", "mean cosine", "spread", "correlation with the clusters"]
        session.report.table(f"The {facts['k']} experts of {facts['run']}", columns, rows)
        session.report.line(f"figure: {facts['figure']}")

    session.show(facts, text)


def _verify(session: Session) -> list[str]:
    from mlx_slm.errors import SlmError
    from mlx_slm.files import Damaged, read_json
    from mlx_slm.storage.artifacts import load_manifest, verify
    from mlx_slm.training.runs import RECORD, verify_run

    good, damaged = [], []
    for path in session.workspace.artifacts():
        try:
            kind = read_json(path / "manifest.json").get("kind")
            verify(path, load_manifest(path, kind))
            good.append(str(path))
        except Damaged as error:
            damaged.append(str(error))
    for path in sorted(file.parent for file in session.workspace.root.rglob(f"runs/**/{RECORD}")):
        try:
            verify_run(path)
            good.append(str(path / RECORD))
        except SlmError as error:
            damaged.append(str(error))
    if damaged:
        raise SlmError("\n  ".join([f"{len(damaged)} of {len(good) + len(damaged)} artifacts are damaged:", *damaged]))
    session.report.line(f"{len(good)} artifacts are whole")
    return good


COMMANDS = (info,)
