"""`prepare`: text -> tokens."""

from __future__ import annotations

import click

from mlx_slm.cli.common import SIZE, Session, common


@click.command()
@click.argument("name")
@click.argument("sources", nargs=-1)
@click.option("--field", help="The field that holds the text. [default: text]")
@click.option("--limit", type=SIZE, help="Stop after so many bytes of training text, such as 500M.")
@click.option("--strict", is_flag=True, help="Fail on invalid UTF-8 instead of replacing it.")
@click.option("--fresh", is_flag=True, help="Make it anew, even if its inputs changed.")
@common
def prepare(session: Session, name, sources, field, limit, strict, fresh) -> None:
    """Read the text of set NAME, split it by document, and tokenise it.

    A SOURCE is a file, a glob, a directory, hf:<dataset>[:<config>] or docs:<package>[,<package>...]; with train=,
    valid= or test= in front it is that split. Files: txt md jsonl csv tsv (also .gz, .zst), parquet. The generic set
    comes first: the tokenizer is trained on it.
    """
    from mlx_slm.text import prepare as work
    from mlx_slm.text.store import Store

    found = work.sources_of(name, list(sources), session.workspace, session.config)
    made = work.prepare(session.workspace, name, found, session.config, session.report, strict, fresh, field, limit)
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


COMMANDS = (prepare,)
