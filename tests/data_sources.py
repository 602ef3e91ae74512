"""Data of every kind that users pass, for tests of what reads it."""

import keras
import numpy as np
import pytest

X = np.arange(10.0).reshape(5, 2)
Y = np.arange(5)


def batches(data):
    """All batches as NumPy arrays, with their sizes."""
    return [
        (
            keras.tree.map_structure(
                lambda a: None if a is None else np.asarray(a), batch
            ),
            size,
        )
        for batch, size in data
    ]


def tf_data(*arrays):
    """A `tf.data.Dataset` of samples."""
    source = arrays if len(arrays) > 1 else arrays[0]
    return pytest.importorskip("tensorflow").data.Dataset.from_tensor_slices(source)


class Batches(keras.utils.PyDataset):
    """Two batches, or endlessly many."""

    def __init__(self, *arrays, length=2):
        super().__init__()
        self.arrays = arrays
        self.length = length

    @property
    def num_batches(self):
        return self.length

    def __getitem__(self, i):
        rows = tuple(a[3 * i : 3 * i + 3] for a in self.arrays)
        return rows if len(rows) > 1 else rows[0]


def py_dataset(*arrays):
    return Batches(*arrays)


def tf_dataset(*arrays):
    return tf_data(*arrays).batch(3)


def data_loader(*arrays, **options):
    torch = pytest.importorskip("torch")
    samples = torch.utils.data.TensorDataset(*[torch.tensor(a) for a in arrays])
    return torch.utils.data.DataLoader(samples, **{"batch_size": 3} | options)


def stream(torch):
    """Three numbers, as data of PyTorch's that does not tell how many it has."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([1.0, 2.0, 3.0])

    return Stream()


#: Each makes a data set in batches of three samples, of arrays.
SOURCES = pytest.mark.parametrize("source", [py_dataset, tf_dataset, data_loader])
