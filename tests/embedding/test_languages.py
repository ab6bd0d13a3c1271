"""Clustering of text in scripts without spaces, and a word where an encoder does not know the language."""

import json

import numpy as np
import pytest
from conftest import Recorder, small_config, write_jsonl
from safetensors.numpy import save_file

from mlx_slm.clustering.clusters import ensure_clusters
from mlx_slm.clustering.kmeans import Lloyd, kmeans
from mlx_slm.clustering.tree import assign
from mlx_slm.config.schema import ClustersConfig
from mlx_slm.embedding import lsi
from mlx_slm.embedding.lsi import LsiEncoder
from mlx_slm.project import Project
from mlx_slm.report import Report
from mlx_slm.storage.workspace import Workspace
from mlx_slm.text.prepare import prepare
from mlx_slm.text.sources import Preparation

TOPICS = {
    "Chinese": (
        ["河流", "石头", "云彩", "冬天", "花园", "山谷", "森林", "海岛", "雨水", "草原", "天空", "树木"],
        ["发动机", "电脑", "程序", "网络", "铜线", "机器", "屏幕", "键盘", "代码", "数据", "电池", "芯片"],
    ),
    "Japanese": (
        ["さくら", "やま", "かわ", "うみ", "はな", "もり", "そら", "あめ", "ゆき", "くも", "しま", "のはら"],
        ["コンピュータ", "プログラム", "データ", "ネット", "キー", "ケーブル", "バッテリー", "モニター", "メモリ"],
    ),
    "Thai": (
        ["แม่น้ำ", "ภูเขา", "ดอกไม้", "ทะเล", "ป่าไม้", "ท้องฟ้า", "ฝน", "หิมะ", "เกาะ", "หุบเขา", "สวน", "เมฆ"],
        ["คอมพิวเตอร์", "โปรแกรม", "เครือข่าย", "หน้าจอ", "ข้อมูล", "แบตเตอรี่", "ชิป", "สายไฟ", "รหัส", "กล้อง"],
    ),
    "Hindi": (
        ["नदी", "पत्थर", "बादल", "सर्दी", "बगीचा", "घाटी", "जंगल", "द्वीप", "बारिश", "आकाश", "पेड़", "फूल"],
        ["इंजन", "कंप्यूटर", "प्रोग्राम", "नेटवर्क", "तार", "मशीन", "स्क्रीन", "कीबोर्ड", "डेटा", "बैटरी", "चिप", "कैमरा"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("language", TOPICS)
def test_lsi_tells_topics_apart_in_any_script(language, tmp_path):
    """Two topics of ten or twelve words each; a space between words only where the script has one."""
    rng, gap = np.random.default_rng(0), " " if language == "Hindi" else ""
    place = np.arange(200) % 2
    found = [gap.join(rng.choice(TOPICS[language][topic], 60)) for topic in place]
    lsi.fit(found, 4, 0, tmp_path, Report())
    centroids, _ = kmeans(LsiEncoder(tmp_path).encode(found), 2, lloyd=Lloyd(seed=0))
    which = next(assign(iter([LsiEncoder(tmp_path).encode(found)]), [centroids]))[0]
    assert max((which == place).mean(), (which != place).mean()) > 0.98


def test_words_of_any_script():
    assert list(lsi.words_of("The Naïve cafe\u0301, a 42nd!")) == ["the", "naïve", "cafe\u0301", "42nd"]
    assert list(lsi.words_of("我們去 東京ab図書館")) == ["我們", "們去", "東京", "ab", "図書", "書館"]
    assert list(lsi.words_of("한국어 문장")) == ["한국어", "문장"], "Korean has spaces"
    assert list(lsi.words_of("हिन्दी में।")) == ["हिन्दी", "में"]


def english_encoder(directory):
    """A model2vec directory that knows some English words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "river", "stone", "cloud", "the", "and"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"model_type": "model2vec", "normalize": True}))
    table = np.random.default_rng(0).standard_normal((len(words), 8)).astype(np.float32)
    save_file({"embeddings": table}, directory / "model.safetensors")
    return directory


def test_an_encoder_says_when_it_does_not_know_the_language(tmp_path, texts):
    config = small_config()
    config = config.model_copy(update={"clusters": ClustersConfig(encoder=str(english_encoder(tmp_path / "e")), k=2)})
    own, report = Workspace(tmp_path / "w"), Recorder()
    chinese = ["".join(TOPICS["Chinese"][i % 2]) * 3 + f"{i}" for i in range(300)]
    prepare(Project(own, config, report), Preparation("generic", [str(write_jsonl(tmp_path / "a.jsonl", chinese))]))
    ensure_clusters(Project(own, config, report), [2], [])
    assert any("does not know" in line and "clusters.encoder" in line for line in report.warnings), report.warnings
