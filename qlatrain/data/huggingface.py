"""Documents from a Hugging Face `datasets` dataset: by index, or streamed from front to back."""

import copy
from pathlib import Path

from huggingface_hub import HfFileSystem

from qlatrain.data.conversations import TextOrConversation
from qlatrain.data.sources import RowField, check_field
from qlatrain.data.text_files import first_line, table_row


def open_dataset(
    dataset: str | None, dataset_config: str | None, split: str, streaming: bool, field: RowField
) -> "IndexedDataset | StreamedDataset":
    """Open `dataset`, a name on the hub or a local folder, without running any code of its author's.

    A folder written by `save_to_disk` is opened as such; everything else goes through `load_dataset`.

    Raises:
        ValueError: it cannot be opened, has no such split or field, or holds no documents.
    """
    import datasets

    if not dataset:
        raise ValueError("data.source=hf needs data.dataset: the name of a dataset, or a local folder.")
    folder = Path(dataset).expanduser()
    saved = (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()
    try:
        if saved:
            opened = datasets.load_from_disk(str(folder))
        else:
            name = str(folder) if folder.exists() else dataset
            opened = datasets.load_dataset(name, dataset_config, split=split, streaming=streaming)
    except Exception as error:  # the library raises some thirty kinds of error here; all mean the same to the user
        raise ValueError(
            f"data.dataset={dataset!r} (data.dataset_config={dataset_config!r}, data.split={split!r}) could not be "
            f"opened: {first_line(error)}"
        ) from error
    if isinstance(opened, dict):
        if split not in opened:
            raise ValueError(f"data.dataset={dataset!r} has no split {split!r}; set data.split to one of {[*opened]}.")
        opened = opened[split]
    if opened.column_names is not None:
        check_field(field, opened.column_names, lambda: f"data.dataset={dataset!r}")
    if streaming and saved:
        opened = opened.to_iterable_dataset()
    # Of a folder only its name: a corpus that was moved is still the same corpus.
    identity = folder.name if folder.exists() else dataset
    description = {"source": "hf", "dataset": identity, "dataset_config": dataset_config, "split": split}
    description |= {"streaming": streaming, **field.description}
    return (StreamedDataset if streaming else IndexedDataset)(opened, field, dataset, description)


class IndexedDataset:
    """A `datasets.Dataset`: memory-mapped, any document at any time."""

    def __init__(self, rows, field: RowField, name: str, description: dict):
        if len(rows) == 0:
            raise ValueError(f"data.dataset={name!r}, split {description['split']!r}, holds no documents.")
        self.rows = rows.select_columns(field.columns(rows.column_names))  # other fields are not decoded
        self.field = field
        self.name = name
        self.description = description

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TextOrConversation:
        return self.field.document(table_row(self.rows[index], self.field), lambda: f"{self.name}, row {index}")


class StreamedDataset:
    """A `datasets.IterableDataset`."""

    def __init__(self, rows, field: RowField, name: str, description: dict):
        self.rows = rows
        self.field = field
        self.name = name
        self.description = description

    def open(self, state: dict | None = None) -> "StreamedReader":
        # An IterableDataset keeps its position inside itself, so every reader needs a copy; data are not copied.
        # It also refers to the process-wide cache of file systems, which other threads add to while it would be
        # copied: the memo says to share it.
        shared = HfFileSystem._cache
        return StreamedReader(copy.deepcopy(self.rows, {id(shared): shared}), self.field, self.name, state)


class StreamedReader:
    """One pass over a `StreamedDataset`; `state` as `datasets` itself keeps it."""

    def __init__(self, rows, field: RowField, name: str, state: dict | None):
        # `state_dict()` knows a loaded state only once iteration has begun; until then it is what we were given.
        self._unread_state = copy.deepcopy(state) if state is not None else rows.state_dict()
        rows.load_state_dict(copy.deepcopy(state))
        self._rows = rows
        self._iterator = iter(rows)
        self._field = field
        self._name = name

    def read(self) -> TextOrConversation | None:
        row = next(self._iterator, None)
        self._unread_state = None
        if row is None:
            return None
        check_field(self._field, row, self._place)  # a stream may not know its fields before it is read
        return self._field.document(table_row(row, self._field), self._place)

    def _place(self) -> str:
        return f"data.dataset={self._name!r}"

    def state(self) -> dict:
        return copy.deepcopy(self._unread_state) if self._unread_state is not None else self._rows.state_dict()
