"""What tests of measures share: a stand-in for Inception, a reference, `evaluate` with both."""

import pytest
from stubs import StubInception, reference

from keras_uvit.evaluation import evaluate


@pytest.fixture
def inception():
    return StubInception()


@pytest.fixture(scope="session")
def real():
    return reference()


@pytest.fixture
def measure(inception, real):
    """`evaluate` of a few images in batches of 4, without warnings."""

    def measure(model, num_images=8, reference=real, **options):
        few = dict(allow_few=True, usual=0, verbose=0, batch_size=4)
        return evaluate(model, reference, inception, num_images, **few | options)

    return measure
