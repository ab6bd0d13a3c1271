"""Text and clusters by several processes: the bits of one."""

import shutil

import pytest
from conftest import copy_of, write_jsonl
from together import MAIN, launch, with_options

from mlx_slm.config.files import dump_config
from mlx_slm.project import Project
from mlx_slm.text.prepare import prepare
from mlx_slm.text.sources import Preparation


def test_clusters_by_ranks(with_experts, tmp_path):
    """Embedding by shards, k-means by chunks of its points, a tree's clusters: the bits of one process, in a workspace
    that two ranks share, and in one of each."""
    small = "from mlx_slm.embedding.lsi import LsiEncoder; LsiEncoder.shard_windows = 500\n"
    small += "import mlx_slm.clustering.kmeans as k; k.chunk_scores = lambda: 1024\n"
    places = [copy_of(with_experts, tmp_path / name) for name in ("one", "shared", "first", "second")]
    for place in places:
        shutil.rmtree(place.root / "embeddings")
        shutil.rmtree(place.root / "clusters")
    one, shared, first, second = places
    clusters = ("cluster", "--k", "3", "--k", "12", "--set", "clusters.tree=[3,4]", "-y", "--workspace")
    (alone,) = launch(1, tmp_path, small + MAIN, *clusters, str(one.root))
    together = launch(2, tmp_path, small + MAIN, *clusters, str(shared.root))
    there = with_options("--workspace", str(second.root), program=small + MAIN)
    apart = launch(2, tmp_path, [small + MAIN, there], *clusters, str(first.root))
    for ended in (alone, *together, *apart):
        assert ended.returncode == 0, ended.stderr
    files = [
        path.relative_to(one.root) for path in one.root.glob("clusters/**/*") if path.suffix in (".u4", ".safetensors")
    ]
    files += [path.relative_to(one.root) for path in one.root.glob("embeddings/**/*.f16")]
    assert len(files) > 20
    for place in (shared, first, second):
        for file in files:
            assert (place.root / file).read_bytes() == (one.root / file).read_bytes(), (place.root, file)
        assert not [path for path in place.root.glob("**/.*") if path.is_dir()]


def test_domains_that_differ_are_told(with_experts, texts, expert_config, tmp_path):
    here, there = (copy_of(with_experts, tmp_path / name) for name in ("here", "there"))
    fewer = write_jsonl(tmp_path / "fewer.jsonl", texts[900:1000])
    prepare(Project(there, expert_config), Preparation("notes", [str(fewer)], fresh=True))
    clusters = ("cluster", "--k", "5", "-y", "--workspace")
    for ended in launch(2, tmp_path, [MAIN, with_options("--workspace", str(there.root))], *clusters, str(here.root)):
        assert ended.returncode == 1 and "has another text of notes/train than rank 0" in ended.stderr, ended.stderr
    assert not here.clusters(5).exists()


COUNTED = """
import os, signal, sys
import mlx_slm
import mlx_slm.text.shards as sh
sh.SHARD_BYTES = 20_000
numbers = []
class Counted(sh.ProcessPoolExecutor):
    def submit(self, function, texts, path):
        numbers.append(path)
        if len(numbers) == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        print("wrote", path.name)
        return super().submit(function, texts, path)
sh.ProcessPoolExecutor = Counted
"""


def counted(*options: str, killed_at: int = 0, text: str = "") -> str:
    """`prepare` in shards of 20 kB, each named when it is tokenised; `text`: of another file."""
    other = f"sys.argv = [{text!r} if word.endswith('.jsonl') else word for word in sys.argv]\n" if text else ""
    return COUNTED.replace("KILLED", str(killed_at)) + other + with_options(*options)


def written(ended) -> list[str]:
    return sorted(line.split()[1] for line in ended.stdout.splitlines() if line.startswith("wrote "))


def stored(root) -> dict[str, bytes]:
    """Every file of the tokenizer and of the sets."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for part in ("tokenizer", "data")
        for path in (root / part).rglob("*")
        if path.is_file() and ".partial" not in path.parts
    }


@pytest.fixture
def preparing(tmp_path, texts, config):
    """Text of some 20 shards, and how to prepare it in one process; returns what that stores."""
    source = write_jsonl(tmp_path / "text.jsonl", texts)
    with open(source, "ab") as file:
        file.write(b'{"text": "One more, with a byte that is none: \xff."}\n')
    settings = tmp_path / "small.yaml"
    settings.write_text(dump_config(config))
    command = ("prepare", "generic", str(source), "--config", str(settings), "-y", "--workspace")
    (alone,) = launch(1, tmp_path, counted(), *command, str(tmp_path / "alone"))
    assert alone.returncode == 0, alone.stderr
    return command, stored(tmp_path / "alone"), written(alone)


def test_text_by_ranks(preparing, tmp_path):
    """Shards are tokenised by rank in a workspace that both share, and all by each where they share none; a
    rank that is killed has not harmed what is there."""
    command, whole, shards = preparing
    assert len(shards) > 10
    shared = launch(2, tmp_path, counted(), *command, str(tmp_path / "shared"))
    own = counted("--workspace", str(tmp_path / "second"))
    apart = launch(2, tmp_path, [counted(), own], *command, str(tmp_path / "first"))
    for ended in (*shared, *apart):
        assert ended.returncode == 0, ended.stderr
    first, second = map(written, shared)
    assert sorted(first + second) == shards and abs(len(first) - len(second)) <= 1
    assert [written(ended) for ended in apart] == [shards, shards]
    for name in ("shared", "first", "second"):
        assert stored(tmp_path / name) == whole, name

    ended = launch(2, tmp_path, [counted(), counted(killed_at=3)], *command, str(tmp_path / "killed"))
    assert [one.returncode for one in ended] == [3, -9], ended[0].stderr
    (again,) = launch(1, tmp_path, counted(), *command, str(tmp_path / "killed"))
    assert again.returncode == 0 and 0 < len(written(again)) < len(shards) - len(first) // 2
    assert stored(tmp_path / "killed") == whole


def test_three_ranks_of_two_hosts(preparing, tmp_path):
    """The first has a workspace of its own, the two others share one; the third reads the text at another path."""
    command, whole, _ = preparing
    (tmp_path / "mounted").mkdir()
    elsewhere = str(shutil.copy(tmp_path / "text.jsonl", tmp_path / "mounted"))
    there = ("--workspace", str(tmp_path / "second"))
    programs = [counted(), counted(*there), counted(*there, text=elsewhere)]
    for ended in launch(3, tmp_path, programs, *command, str(tmp_path / "first")):
        assert ended.returncode == 0, ended.stderr
    assert stored(tmp_path / "first") == stored(tmp_path / "second") == whole
    for fresh in ([], ["--fresh"]):
        for ended in launch(3, tmp_path, [counted(*fresh)] * 3, *command, str(tmp_path / "second")):
            assert ended.returncode == 0 and bool(written(ended)) == bool(fresh), ended.stderr
    assert stored(tmp_path / "second") == whole


def test_text_that_only_the_first_rank_has(preparing, tmp_path):
    """Another needs it only where it does not see what the first makes of it."""
    command, whole, shards = preparing
    gone = str(tmp_path / "gone.jsonl")
    first, second = launch(2, tmp_path, [counted(), counted(text=gone)], *command, str(tmp_path / "shared"))
    assert first.returncode == 0 and written(first) == shards and stored(tmp_path / "shared") == whole
    assert second.returncode == 0 and not written(second), second.stderr
    own = counted("--workspace", str(tmp_path / "own"), text=gone)
    first, second = launch(2, tmp_path, [counted(), own], *command, str(tmp_path / "shared"))
    assert first.returncode == 3 and "rank 1 (" in first.stderr and "gone.jsonl: no such file" in first.stderr
    assert second.returncode == 1 and "gone.jsonl" in second.stderr and not written(second), second.stderr


def test_text_and_settings_that_differ(preparing, tmp_path):
    command, _, _ = preparing
    other = write_jsonl(tmp_path / "other.jsonl", ["Another text.", "And one more of it."])
    for program, what in (
        (counted(text=str(other)), "text of generic"),
        (counted("--set", "data.test_fraction=0.5"), "data.test_fraction"),
        (counted("--set", "tokenizer.vocab_size=300"), "tokenizer.vocab_size"),
        (counted("--fresh"), "--fresh"),
    ):
        for ended in launch(2, tmp_path, [counted(), program], *command, str(tmp_path / "none")):
            assert ended.returncode == 1 and f"has another {what} than rank 0" in ended.stderr, ended.stderr
    assert not (tmp_path / "none" / "data").exists()
