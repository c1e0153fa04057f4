import numpy as np
import pytest
from methods.data import labelled
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from conceptx.methods import INLP, LEACE, RLACE, MeanDifference, PCADirections
from conceptx.sklearn import ConceptEraser

ERASERS = [None, RLACE(), MeanDifference(), INLP(rounds=2), PCADirections()]


@parametrize_with_checks([ConceptEraser(eraser) for eraser in ERASERS])
def test_scikit_learn_accepts_it(estimator, check):
    check(estimator)


def test_a_search_chooses_among_erasers():
    X, z = labelled(300, 8, 2)
    pipeline = make_pipeline(StandardScaler(), ConceptEraser(), LogisticRegression())
    erasers = [LEACE(), PCADirections(), INLP(rounds=1)]
    search = GridSearchCV(pipeline, {"concepteraser__eraser": erasers}, cv=3, error_score="raise").fit(X, z)
    scores = dict(zip(erasers, search.cv_results_["mean_test_score"], strict=True))
    assert scores[LEACE()] < scores[PCADirections()]
    assert search.best_params_["concepteraser__eraser"] != LEACE()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fit_transform_is_the_erasers_own_removal(dtype):
    X, z = labelled(200, 6, 3)
    X = X.astype(dtype)
    clean = ConceptEraser().fit_transform(X, [f"class {c}" for c in z])
    assert clean.dtype == dtype
    np.testing.assert_array_equal(clean, LEACE().fit(X, z).remove(X))


def test_columns_keep_their_names():
    eraser = ConceptEraser().fit(*labelled(50, 3, 2))
    assert eraser.get_feature_names_out(["a", "b", "c"]).tolist() == ["a", "b", "c"]
