"""The questions of the tasks beside this file, as lm-eval asks for them (`custom_dataset`); no hub is needed."""

from datasets import Dataset, DatasetDict

from slimllm_nb.sources import questions


def analogies(**_) -> DatasetDict:
    return DatasetDict(test=Dataset.from_list(questions.analogies()))


def continuations(**_) -> DatasetDict:
    return DatasetDict(test=Dataset.from_list(questions.continuations()))
