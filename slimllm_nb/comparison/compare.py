"""compare(methods): every method at SlimLLM's number of decoder parameters, over settings and seeds."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from pathlib import Path

import torch

from slimllm_nb.comparison.judges import judged_blocks
from slimllm_nb.comparison.protocol import Protocol, judged_corpora, named, protocol_of
from slimllm_nb.comparison.table import Comparison, Row
from slimllm_nb.corpora import find_corpus
from slimllm_nb.devices import device_name, find_device
from slimllm_nb.evaluation import count_parameters, perplexity, token_blocks
from slimllm_nb.files import commit, write_text
from slimllm_nb.fingerprint import digest, fingerprint
from slimllm_nb.generated import real_and_generated
from slimllm_nb.methods import Method, MethodLike
from slimllm_nb.progress import bar as progress_bar
from slimllm_nb.pruning import layer_similarities, prune
from slimllm_nb.recipe import Recipe
from slimllm_nb.reproduce.profiles import Profile, load_profile, run_folder
from slimllm_nb.reproduce.setting import ZeroShot
from slimllm_nb.sources import load_model, load_tokenizer


def compare(
    methods: Sequence[MethodLike],
    settings: Sequence[str] | None = None,
    seeds: int = 5,
    *,
    profile: str | Profile = "embedded",
    calibrate_on: Sequence[str] | None = None,
    judge_on: Sequence[str] | None = None,
    num_samples: int | None = None,
    generated: int = 0,
    progress: bool = True,
) -> Comparison:
    """Perplexity of pruned models, every method with the same samples and as many decoder parameters as SlimLLM leaves.

    methods: as in methods.as_method; SlimLLM as published is always among them, because the others are compared with it
    seed by seed. settings: keys of the profile's ("20", "50"; default: all). seeds: 0, 1, ... draw the calibration
    samples. calibrate_on, judge_on, num_samples, generated: see comparison.protocol_of and Protocol.

    SlimLLM prunes by the setting's own ratio; every other method gets the decoder share that SlimLLM left with that
    seed as target_parameters, which it meets within 0.3 points. Every row is kept under runs/<profile>/comparison as
    soon as it is there, and taken from there as long as nothing that made it has changed: an interrupted comparison
    goes on, and a method more costs that method alone.
    Raises: ValueError, before anything is measured, for an unknown method, part, setting or corpus and for two methods
    of one name; later, naming method, setting and seed, for a target that a method cannot meet.
    """
    profile = load_profile(profile) if isinstance(profile, str) else profile
    chosen = named(methods)
    keys = list(profile.settings) if settings is None else [str(key) for key in settings]
    if unknown := [key for key in keys if key not in profile.settings]:
        wrong, allowed = ", ".join(unknown), ", ".join(profile.settings)
        raise ValueError(f"profile {profile.name} has no setting {wrong}; allowed: {allowed}")
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; allowed: at least 1")
    bench = Bench(profile, protocol_of(profile, calibrate_on, judge_on, num_samples, generated), progress)
    total = seeds * len(keys) * len(chosen)
    rows = []
    with progress_bar(total=total, desc="comparing", unit="row", progress=progress) as bar:
        for row in bench.rows(chosen, keys, seeds):
            rows.append(row)
            bar.set_postfix_str(f"{row.method}, {row.setting} %, seed {row.seed}", refresh=False)
            bar.update()
    return Comparison(bench.protocol, bench.dense(), rows)


@dataclass
class Bench:
    """A model, texts and a protocol: measures rows, or finds them measured. Loads nothing that no new row needs."""

    profile: Profile
    protocol: Protocol
    progress: bool = True
    zeroshot: ZeroShot | None = None  # asked of every row, too
    _loaded: dict = field(default_factory=dict, repr=False)
    _drawn: dict = field(default_factory=dict, repr=False)

    def rows(self, methods: dict[str, Method], settings: Sequence[str], seeds: int) -> Iterator[Row]:
        """Seed by seed, SlimLLM first, so that what an interruption leaves can be compared."""
        for seed in range(seeds):
            for key in settings:
                yield from self.rows_of_seed(methods, key, seed)

    def rows_of_seed(
        self, methods: dict[str, Method], key: str, seed: int, known: Mapping[str, Row] | None = None, measure=True
    ) -> Iterator[Row]:
        """The rows that share a budget; SlimLLM's comes first and sets it. known: by method, those that are there.
        measure: False: ends where one is neither known nor measured already."""
        share, make = None, self.row if measure else self.found
        for name, method in methods.items():
            row = (known or {}).get(name) or make(method, key, seed, share)
            if row is None:
                return
            share = row.decoder_share if share is None else share
            yield row

    def row(self, method: Method, key: str, seed: int, share: float | None) -> Row:
        """One method, setting and seed. share: of the decoder that is to be left; None: by the setting's own amount."""
        amount = self._amount(key, share)

        def measured() -> Row:
            samples, similarity, seconds = self._samples(seed)
            try:
                start = time.perf_counter()
                options = {"similarity": similarity, "seed": seed, "progress": self.progress}
                untuned = replace(method, tuning=None)
                pruned, _ = prune(self._model, samples, **amount, method=untuned, **options)
                if method.tuning:
                    pruned, _ = self._tuned(pruned, method.tuning, seed)
                seconds = time.perf_counter() - start + (seconds if "similarity" in method.allocation.needs else 0.0)
            except ValueError as error:
                raise ValueError(f"method {method.name}, setting {key}, seed {seed}: {error}") from error
            return self._row(pruned, method=method.name, setting=key, seed=seed, seconds=seconds)

        return _named(self.keep(self.made_by(method, key, seed, share), measured), method, key)

    def found(self, method: Method, key: str, seed: int, share: float | None) -> Row | None:
        """The same row where it is measured already; None where it is not."""
        row = self._read(self.made_by(method, key, seed, share))
        return row and _named(row, method, key)

    def share_model(self, other: "Bench") -> None:
        """Take the model and the tokenizer of another bench of this profile."""
        self._loaded = other._loaded

    def made_by(self, method: Method, key: str, seed: int, share: float | None) -> str:
        """The fingerprint of all that decides this row. Loads no model."""
        return fingerprint(common=self._common, parts=method.identity, amount=self._amount(key, share), seed=seed)

    def _amount(self, key: str, share: float | None) -> dict:
        setting = self.profile.settings[key]
        if share is None:
            return {name: value for name, value in setting.arguments.items() if name != "method"}
        return {"target_parameters": share, "target_of": "decoder", **setting.spread}

    def dense(self) -> Row:
        """The model from which nothing goes."""
        return self.keep(fingerprint(common=self._common), lambda: self._row(self._model, method="dense"))

    def _row(self, model, **what) -> Row:
        left, whole = count_parameters(model), count_parameters(self._model)
        return Row(
            perplexity={corpus: perplexity(model, blocks, progress=False) for corpus, blocks in self._blocks.items()},
            accuracy=self._accuracy(model),
            decoder_parameters=left["decoder"],
            decoder_share=left["decoder"] / whole["decoder"],
            model_parameters=left["model"],
            model_share=left["model"] / whole["model"],
            **what,
        )

    def keep(self, made_by: str, measured: Callable[[], Row]) -> Row:
        """The row of this fingerprint: read, or measured and written."""
        if (row := self._read(made_by)) is not None:
            return row
        made = {"commit": commit(), "date": date.today().isoformat()}
        made["machine"] = f"{device_name(find_device(self.profile.device))}, torch {torch.__version__}"
        row = measured().model_copy(update=made)
        write_text(self._path(made_by), row.model_dump_json(indent=1) + "\n")
        return row

    def _read(self, made_by: str) -> Row | None:
        path = self._path(made_by)
        return Row.model_validate_json(path.read_text(encoding="utf-8")) if path.is_file() else None

    def _path(self, made_by: str) -> Path:
        return comparison_folder(self.profile.name) / f"{made_by[:24]}.json"

    @cached_property
    def _common(self) -> str:
        """The model and how it is loaded, the protocol, and the content of texts of one's own."""
        profile, protocol = self.profile, self.protocol
        names = *protocol.calibrate_on, *judged_corpora(protocol.judge_on)
        corpora = [find_corpus(name, profile.texts) for name in names]
        files = [Path(file) for one in corpora if one is not None for file in one.files or ()]
        model = [Path(profile.model) if Path(profile.model).is_dir() else profile.model]
        model += [profile.loading, profile.tokenizing]
        return digest(model=model, protocol=protocol, texts=[corpora, files], asked=self.zeroshot)

    @property
    def _model(self):
        if "model" not in self._loaded:
            self._loaded["model"] = load_model(self.profile.model, **self.profile.loading)
        return self._loaded["model"]

    @property
    def _tokenizer(self):
        if "tokenizer" not in self._loaded:
            self._loaded["tokenizer"] = load_tokenizer(self.profile.model, **self.profile.tokenizing)
        return self._loaded["tokenizer"]

    @cached_property
    def _blocks(self) -> dict[str, torch.Tensor]:
        given = self.protocol, self.profile.texts, self._tokenizer, lambda: self._model
        return judged_blocks(*given, self._path(fingerprint(common=self._common)).with_suffix(".safetensors"))

    @cached_property
    def _texts(self) -> list[str]:
        return self.protocol.calibration_texts(self.profile.texts)

    def _samples(self, seed: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Calibration samples, the dense layers' similarities on them, and how many seconds these took."""
        if seed not in self._drawn:
            self._drawn.clear()  # one seed after the other
            sizes = self.protocol.num_samples, self.protocol.generated, self.protocol.length, seed
            keep = self._path(fingerprint(common=self._common, seed=seed)).with_suffix(".safetensors")
            given = self._texts, self._tokenizer, lambda: self._model
            samples = real_and_generated(*given, *sizes, keep, self.progress)
            start = time.perf_counter()
            similarity = layer_similarities(self._model, samples, progress=self.progress)
            self._drawn[seed] = samples, similarity, time.perf_counter() - start
        return self._drawn[seed]

    def _tuned(self, pruned, recipe: Recipe, seed: int):
        """Trained on what follows in the texts that the calibration samples are drawn from."""
        from slimllm_nb.tuning import tune  # imports peft, which others need not wait for

        blocks = token_blocks(self._texts, self._tokenizer, self.protocol.length)
        return tune(pruned, [(one, one) for one in blocks], recipe=recipe, seed=seed, progress=self.progress)

    def _accuracy(self, model) -> dict[str, float]:
        if self.zeroshot is None:
            return {}
        from slimllm_nb.evaluation.zeroshot import zeroshot  # imports lm-eval, which others need not wait for

        asked = self.zeroshot.model_dump(exclude={"tasks"})
        found = zeroshot(model, self._tokenizer, self.zeroshot.tasks, **asked, progress=False)
        return dict(zip(found["task"], found["accuracy"], strict=True))


def _named(row: Row, method: Method, key: str) -> Row:
    """The same parts under another name are the same row."""
    return row.model_copy(update={"method": method.name, "setting": key})


def comparison_folder(profile: str) -> Path:
    """Where the rows of a profile are kept."""
    return run_folder(profile) / "comparison"
