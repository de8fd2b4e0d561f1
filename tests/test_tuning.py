"""Recovery training: what is merged, what is learned, resuming, refusals."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

from conftest import make_small_model
from slimllm_nb import tuning
from slimllm_nb.comparison.compare import Bench
from slimllm_nb.llama import PROJECTIONS
from slimllm_nb.methods import PartError, as_method
from slimllm_nb.pruning import prune
from slimllm_nb.recipe import IGNORED, Recipe
from slimllm_nb.trainer import collate
from slimllm_nb.tuning import tune

RECIPE = Recipe(learning_rate=2e-2, epochs=2, samples=24, held_out=8, batch_size=8, at_once=4, evaluations=2)
OPTIONS = {"pruning_ratio": 0.4, "pruned_layers": 3, "alpha": 2.0, "progress": False}


@pytest.fixture
def pruned(generator):
    """Uneven groups, and samples of a text that can be learned: every token follows from the one before."""
    ids = torch.randint(0, 101, (20, 10), generator=generator)
    samples = [(start + torch.arange(12)) % 100 for start in torch.randint(0, 100, (40,), generator=generator)]
    return prune(make_small_model(2), ids, **OPTIONS)[0], [(one, one) for one in samples]


def loss(model, samples):
    """Literally: nats a token, sample by sample."""
    total, count = 0.0, 0
    for ids, labels in samples:
        logits = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
        for place, label in enumerate(labels[1:]):
            if label != IGNORED:
                total, count = total - logits[place, label].item(), count + 1
    return total / count


@torch.no_grad()
def test_it_learns_and_the_report_says_what(pruned):
    model, samples = pruned
    before, shapes = copy.deepcopy(model), {name: one.shape for name, one in model.state_dict().items()}
    tuned, report = tune(model, samples, recipe=RECIPE, seed=3, progress=False)
    assert tuned is model and {name: one.shape for name, one in tuned.state_dict().items()} == shapes
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    held_out = [samples[index] for index in order[:8]]
    assert report.before == pytest.approx(loss(before, held_out), rel=1e-5)
    assert report.validation[report.best_step] == pytest.approx(loss(tuned, held_out), rel=1e-4)
    assert loss(tuned, held_out) < 0.9 * loss(before, held_out)
    assert (report.samples, report.steps, report.tokens) == (24, 6, 2 * 24 * 11)
    for name, weight in tuned.state_dict().items():  # nothing but the seven projections, each by a matrix of low rank
        moved = (
            torch.linalg.matrix_rank((weight - before.state_dict()[name]).double(), tol=1e-5) if weight.ndim > 1 else 0
        )
        projection = name.split(".")[-2] in {one for names in PROJECTIONS.values() for one in names.values()}
        assert (0 < moved <= RECIPE.rank) if projection and name.endswith("weight") else moved == 0
    pruned_again, _ = prune(tuned, torch.stack([ids for ids, _ in samples]), **OPTIONS | {"pruning_ratio": 0.2})
    assert torch.isfinite(pruned_again(samples[0][0][None]).logits).all()


@torch.no_grad()
def test_what_is_merged_is_the_formula(pruned):
    """Against W + alpha / rank * B A, written out."""
    model, _ = pruned
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, lora_alpha=16, target_modules=["down_proj"]))
    for name, one in adapted.named_parameters():
        if "lora_B" in name:
            one.copy_(torch.randn(one.shape, generator=torch.Generator().manual_seed(len(name))))
    layer = adapted.base_model.model.model.layers[1].mlp.down_proj
    expected = layer.base_layer.weight + 16 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(adapted.merge_and_unload().model.layers[1].mlp.down_proj.weight, expected, atol=1e-6)


@pytest.mark.slow
def test_an_interrupted_training_goes_on(pruned, tmp_path, monkeypatch):
    model, samples = pruned
    whole, first = tune(copy.deepcopy(model), samples, recipe=RECIPE, progress=False)
    begun, steps, train = copy.deepcopy(model), [], Trainer.train

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            steps.append(state.global_step)
            if len(steps) == 4:
                raise KeyboardInterrupt

    def watched(self, *args, **options):
        self.add_callback(Stops())
        return train(self, *args, **options)

    monkeypatch.setattr(Trainer, "train", watched)
    with pytest.raises(KeyboardInterrupt):
        tune(begun, samples, recipe=RECIPE, folder=tmp_path / "work", progress=False)
    assert all(torch.equal(one, begun.state_dict()[name]) for name, one in model.state_dict().items())  # as it came
    resumed, second = tune(begun, samples, recipe=RECIPE, folder=tmp_path / "work", progress=False)
    assert steps == [1, 2, 3, 4, 4, 5, 6]  # from the evaluation at step 3
    assert second.validation == first.validation and second.before == first.before
    assert all(torch.equal(one, resumed.state_dict()[name]) for name, one in whole.state_dict().items())
    tune(copy.deepcopy(model), samples, recipe=RECIPE, folder=tmp_path / "work", seed=1, progress=False)
    assert steps[7:] == [1, 2, 3, 4, 5, 6]  # another seed begins anew


def test_padding_and_ignored_labels_count_for_nothing(pruned):
    model, samples = pruned
    masked = [(ids[: 5 + index], labels[: 5 + index].clone()) for index, (ids, labels) in enumerate(samples[:4])]
    for _, labels in masked:
        labels[:3] = IGNORED
    with torch.no_grad():
        assert model(**collate(masked)).loss.item() == pytest.approx(loss(model, masked), rel=1e-5)


def test_refusals(pruned):
    model, samples = pruned
    cases = [
        (model, samples[:20], RECIPE, r"20 samples; 32 are needed, 8 of them held out"),
        (copy.deepcopy(model).half(), samples, RECIPE, r"float16 on the CPU; allowed: float32, or an accelerator"),
        (model, [(torch.arange(101).repeat(99),) * 2] * 40, RECIPE, "9999"),
    ]
    for one, some, recipe, message in cases:
        with pytest.raises(ValueError, match=message):
            tune(one, some, recipe=recipe, progress=False)
    with pytest.raises(ValueError, match="at_once is 3; allowed: what divides batch_size, 8"):
        Recipe(batch_size=8, at_once=3)
    with pytest.raises(PartError, match=r"(?s)tuning of a method: .*rank"):
        as_method({"tuning": {"rank": 0}})
    with pytest.raises(ValueError, match=r"slimllm, tuned is trained after pruning: prune without, then tuning\.tune"):
        prune(make_small_model(4), samples[0][0][None], **OPTIONS, method={"tuning": {}})


def test_what_does_not_fit_is_refused(pruned, monkeypatch):
    model, samples = pruned
    monkeypatch.setattr(tuning.torch.accelerator, "get_memory_info", lambda device: (1000, 2000))
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cuda")))
    with pytest.raises(
        ValueError, match=r"training needs 0\.0 GB beside the model, .* at_once is 4, set a smaller one"
    ):
        tune(model, samples, recipe=RECIPE, progress=False)


def test_a_compared_method_may_be_trained(monkeypatch):
    """Between pruning and perplexity, with the recipe; the row is another one than the untrained method's."""
    plain, trained = as_method("flap"), as_method({"base": "flap", "tuning": {"samples": 3}})
    bench = object.__new__(Bench)
    bench.profile, bench._common = None, "model"
    monkeypatch.setattr(Bench, "_amount", lambda *_: {})
    assert bench.made_by(plain, "20", 0, None) != bench.made_by(trained, "20", 0, None)
    assert trained.name == "flap, tuned" and trained.tuning.samples == 3
