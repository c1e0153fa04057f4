import numpy as np
import pytest
import torch

from conceptx.geometry.labels import class_indices, encode_labels

BINARY = [["f", "m", "f"], [True, False, True], [0, 1, 0], [0.0, 1.0, 0.0], np.array(["f", "m", "f"], dtype=object)]


@pytest.mark.parametrize("labels", BINARY)
def test_two_classes_are_one_column(labels):
    column = encode_labels(labels, 3)
    assert column.dtype == torch.float64
    assert sorted(set(column.flatten().tolist())) == [0.0, 1.0]
    assert column[0] == column[2] != column[1]


@pytest.mark.parametrize("labels", [["a", "c", "b", "a"], torch.tensor([5, 9, 7, 5]), np.array([0.0, 2.0, 1.0, 0.0])])
def test_more_classes_are_one_hot(labels):
    assert encode_labels(labels, 4).tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]]
    indices, classes = class_indices(labels, 4)
    assert (indices.tolist(), classes) == ([0, 2, 1, 0], 3)


def test_numbers_that_are_not_whole_are_continuous():
    assert encode_labels(torch.tensor([0.5, 1.0, 2.0], dtype=torch.bfloat16), 3).tolist() == [[0.5], [1.0], [2.0]]
    with pytest.raises(ValueError, match="continuous"):
        class_indices([0.5, 1.0, 2.0], 3)


def test_a_matrix_is_taken_as_it_is():
    years = np.array([[1990], [2000], [2013]])
    assert encode_labels(years, 3).tolist() == years.tolist()
    one_hot = np.eye(3)[[2, 0, 1]]
    assert class_indices(one_hot, 3)[0].tolist() == [2, 0, 1]
    assert class_indices([[0], [1]], 2)[0].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "a", "a"], "one class only, 'a'"),
        ([1, 1, 1], "one class only, 1"),
        ([0, 1], r"n = 3 rows, got shape \(2,\)"),
        (np.zeros((3, 1, 1)), "n = 3 rows"),
        ([0.0, np.nan, 1.0], "1 NaN or missing"),
        (np.array(["a", None, "b"], dtype=object), "1 NaN or missing"),
        (np.array(["a", 1, "b"], dtype=object), "cannot be sorted"),
        (np.array([1j, 2, 3]), "neither classes nor numbers"),
    ],
)
def test_errors_say_what_is_wrong(labels, message):
    for encode in (encode_labels, class_indices):
        with pytest.raises(ValueError, match=message):
            encode(labels, 3)


def test_columns_that_never_vary_are_refused():
    with pytest.raises(ValueError, match="same in every row"):
        encode_labels([[2.0], [2.0], [2.0]], 3)


@pytest.mark.parametrize("labels", [[[1, 1], [0, 1], [1, 0]], [[0.2], [1.0], [0.5]]])
def test_only_one_hot_matrices_are_classes(labels):
    with pytest.raises(ValueError, match=r"one-hot|continuous"):
        class_indices(labels, 3)
