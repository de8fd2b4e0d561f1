"""transformers' Trainer as tuning.tune needs it: its arguments, batches, silence and our progress bar."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from slimllm_nb.progress import bar as progress_bar
from slimllm_nb.recipe import IGNORED, Recipe

Sample = tuple[Int[Tensor, "length"], Int[Tensor, "length"]]  # token ids; labels, IGNORED where no loss is wanted


def arguments_of(model: PreTrainedModel, recipe: Recipe, folder: Path, seed: int) -> TrainingArguments:
    """As the recipe says; evaluated, saved and resumed at the same steps."""
    here, at_once = model.device.type == "cpu", min(recipe.at_once, recipe.batch_size)
    sizes = {"per_device_train_batch_size": at_once, "per_device_eval_batch_size": at_once}
    sizes["gradient_accumulation_steps"] = recipe.batch_size // at_once
    often = {f"{what}_steps": 1 / recipe.evaluations for what in ("eval", "save")}
    often |= {"eval_strategy": "steps", "save_strategy": "steps", "eval_on_start": True, "save_total_limit": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    # float16 needs its loss scaled; in bfloat16 nothing is asked for, because A and B are float32 in any case.
    device = {"fp16": model.dtype == torch.float16, "activation_checkpointing": not here, "use_cpu": here}
    silent = {"logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    plain = {"dataloader_pin_memory": False, "remove_unused_columns": False}
    rates = {"learning_rate": recipe.learning_rate, "warmup_steps": recipe.warmup, "num_train_epochs": recipe.epochs}
    options = sizes | often | best | device | silent | plain | rates
    return TrainingArguments(output_dir=str(folder), seed=seed, **options)


def train(
    adapted: torch.nn.Module, samples: list, held_out: list, arguments: TrainingArguments, progress: bool
) -> TrainerState:
    """Train from the last step that is kept in the folder; the weights with the lowest validation loss are left."""
    sets = {"train_dataset": samples, "eval_dataset": held_out, "data_collator": collate}
    trainer = Trainer(adapted, arguments, **sets, callbacks=[_Bar(progress)])
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(arguments.output_dir))
    return trainer.state


def collate(samples: Sequence[Sample]) -> dict[str, Int[Tensor, "samples length"]]:
    """A batch, padded on the right."""
    ids, labels = zip(*samples, strict=True)
    mask = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
    padded = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    return {"input_ids": pad_sequence(ids, batch_first=True), "labels": padded, "attention_mask": mask}


@contextmanager
def quiet() -> Iterator[None]:
    """Without what peft and the Trainer say of themselves."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(before)


class _Bar(TrainerCallback):
    """Our progress bar in the place of the Trainer's."""

    def __init__(self, progress: bool):
        self.progress = progress

    def on_train_begin(self, args, state, control, **_):
        options = {"total": state.max_steps, "initial": state.global_step, "progress": self.progress}
        self.bar = progress_bar(desc="LoRA", unit="step", **options)

    def on_step_end(self, args, state, control, **_):
        self.bar.update()

    def on_train_end(self, args, state, control, **_):
        self.bar.close()
