"""TensorFlow Datasets: what each set gives, and ImageNet from tar files to training."""

import functools
import io
import json
import subprocess
import sys
import tarfile

import keras
import numpy as np
import pytest
import tensorflow_datasets as tfds
from caches import grey, write_cache
from PIL import Image
from tiny import refused

from keras_uvit import data
from keras_uvit.data import tfds_images, tfds_source

pytestmark = pytest.mark.once


@pytest.fixture
def mocked(tmp_path):
    """Every data set is there, six examples long, with random pixels; nothing is downloaded."""
    with tfds.testing.mock_data(num_examples=6):
        yield {"data_dir": tmp_path}


def _records(name):
    """The mocked records, straight from the data set."""
    return list(tfds.builder(name, file_format="array_record").as_data_source("train"))


def test_images_and_labels_are_those_of_the_set(mocked):
    source = tfds_source("cifar10", **mocked)
    assert (source.name, len(source)) == ("tfds:cifar10/train", 6)
    assert (source.shape, source.num_classes) == ((32, 32, 3), 10)
    assert len(source.class_names) == 10
    for i, record in enumerate(_records("cifar10")):
        sample = source.read(i)
        assert sample["image"].dtype == np.uint8
        np.testing.assert_array_equal(sample["image"], record["image"])
        assert sample["label"] == record["label"]
    images = tfds_images("cifar10", batch_size=4, flip=False, seed=3, verbose=0, **mocked)
    assert (images.num_classes, images.num_samples, len(images)) == (10, 6, 1)
    assert images.class_names == source.class_names
    for i, row in enumerate(images.rows(0, 0)):
        np.testing.assert_array_equal(images[0]["image"][i], source.read(row)["image"])
        assert images[0]["label"][i] == source.read(row)["label"]


@pytest.mark.parametrize(
    ("name", "options", "shape", "num_classes"),
    [
        ("cifar10", {"labels": None}, (32, 32, 3), None),
        ("cifar10", {"image_size": (8, 16)}, (8, 16, 3), 10),
        ("imagenet_resized/64x64", {}, (64, 64, 3), 1000),
        ("downsampled_imagenet/64x64", {"image_size": 64}, (64, 64, 3), None),
        ("celeb_a", {}, (218, 178, 3), None),
        ("imagenet2012", {"image_size": 48}, (48, 48, 3), 1000),
    ],
)
def test_a_set_has_labels_where_it_has_classes(mocked, name, options, shape, num_classes):
    source = tfds_source(name, **options, **mocked)
    assert (source.shape, source.num_classes) == (shape, num_classes)
    assert (source.class_names is None) == (num_classes is None)
    for i in range(len(source)):
        sample = source.read(i)
        assert sample["image"].shape == shape
        assert ("label" in sample) == (num_classes is not None)
        assert num_classes is None or 0 <= sample["label"] < num_classes


def test_the_papers_crop_of_celeba_is_its_middle_and_halved(mocked):
    crop = dict(crop=(57, 25, 128, 128))
    halved = tfds_source("celeb_a", image_size=64, **crop, **mocked)
    whole = tfds_source("celeb_a", image_size=128, **crop, **mocked)
    for i, record in enumerate(_records("celeb_a")):
        part = np.asarray(record["image"])[57:185, 25:153]
        np.testing.assert_array_equal(whole.read(i)["image"], part)
        means = part.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
        # Pillow's box filter goes along rows, then columns, and rounds each time.
        np.testing.assert_allclose(halved.read(i)["image"], means, atol=1)


def test_grey_sets_stay_grey_or_get_three_equal_channels(mocked):
    grey, colour = (tfds_source("mnist", channels=k, **mocked) for k in (1, 3))
    assert (grey.shape, colour.shape) == ((28, 28, 1), (28, 28, 3))
    for i, record in enumerate(_records("mnist")):
        np.testing.assert_array_equal(grey.read(i)["image"], record["image"])
        threefold = np.repeat(record["image"], 3, axis=2)
        np.testing.assert_array_equal(colour.read(i)["image"], threefold)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("cifar11", {}, ["no 'cifar11'", "list_builders"]),
        ("imagenet_resized/7x7", {}, ["7x7", "64x64"]),
        ("imagenet2012", {}, ["imagenet2012 differ in size", "which image_size"]),
        ("imdb_reviews", {}, ["imdb_reviews has no images", "'text'"]),
        ("cifar10", {"image_size": 0}, ["image_size", "0"]),
        ("cifar10", {"crop": (0, 0, 8, 8)}, ["which image_size"]),
        ("cifar10", {"channels": 4}, ["channels", "4"]),
        ("cifar10", {"labels": "ids"}, ["labels", "ids"]),
    ],
)
def test_sets_and_arguments_that_do_not_fit_are_refused(mocked, name, options, words):
    refused(ValueError, lambda: tfds_source(name, **options, **mocked), *words)


def test_a_missing_package_names_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    refused(ImportError, lambda: tfds_source("cifar10"), 'pip install "keras-uvit[tfds]"')


SYNSETS = {"n01440764": 0, "n01443537": 1, "n15075141": 999}  # tench, goldfish, toilet tissue
FIRST_VALIDATION_SYNSETS = ["n01751748", "n09193705", "n02105855"]  # in the order of their names


def _jpeg(number):
    """An image of a grey level and a size of its own."""
    file = io.BytesIO()
    Image.fromarray(grey(20 * number + 10, 32 + 4 * (number % 3), 40)).save(file, "JPEG")
    return file.getvalue()


def _tar(files):
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return target.getvalue()


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Reads a split from small tar files as image-net.org hands them out."""
    path = tmp_path_factory.mktemp("datasets")
    manual = path / "downloads" / "manual"
    manual.mkdir(parents=True)
    train = {
        f"{synset}.tar": _tar({f"{synset}_{i}.JPEG": _jpeg(3 * k + i) for i in range(3)})
        for k, synset in enumerate(SYNSETS)
    }
    names = {k: f"ILSVRC2012_val_{k + 1:08d}.JPEG" for k in (2, 0, 1)}  # in no order
    validation = {name: _jpeg(k) for k, name in names.items()}
    for split, files in [("train", train), ("val", validation)]:
        (manual / f"ILSVRC2012_img_{split}.tar").write_bytes(_tar(files))
    return functools.partial(tfds_source, "imagenet2012", image_size=32, data_dir=path)


def _numbers(source):
    """Which of the originals its images are, and their labels."""
    samples = [source.read(i) for i in range(len(source))]
    return [(int(sample["image"].mean() // 20), sample["label"]) for sample in samples]


def test_imagenet_is_prepared_from_its_tar_files(imagenet):
    source = imagenet("train")
    assert (source.name, len(source)) == ("tfds:imagenet2012/train", 9)
    assert (source.shape, source.num_classes) == ((32, 32, 3), 1000)
    assert [source.class_names[k] for k in (0, 1, 999)] == list(SYNSETS)
    labels = [label for label in SYNSETS.values() for _ in range(3)]
    assert sorted(_numbers(source)) == list(enumerate(labels))


def test_validation_labels_go_by_name_and_not_by_place_in_the_tar_file(imagenet):
    source = imagenet("validation")
    names = {number: source.class_names[label] for number, label in _numbers(source)}
    assert names == dict(enumerate(FIRST_VALIDATION_SYNSETS))


def test_a_split_can_be_cut_and_joined_and_an_unknown_one_is_named(imagenet):
    assert _numbers(imagenet("train[2:5]")) == _numbers(imagenet("train"))[2:5]
    assert len(imagenet("train+validation")) == 12
    for split in ("nope", "train[:x]", "test"):
        with pytest.raises(ValueError, match=r"has the splits \['train', 'validation'\]"):
            imagenet(split)


def test_missing_tar_files_are_named(tmp_path):
    with pytest.raises((ValueError, OSError), match=r"downloads/manual(.|\n)*img_train\.tar"):
        tfds_source("imagenet2012", "train", 32, data_dir=tmp_path)


WITHOUT_TENSORFLOW = """
import json, sys
from importlib.machinery import PathFinder

class WithoutTensorFlow(PathFinder):  # as if it were not installed
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "tensorflow" else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTensorFlow
del sys.modules["tensorflow"]  # where `alone` has put that Keras finds none
from keras_uvit import data
sys.modules["tensorflow_datasets"] = None
cache = data.LatentDataset(sys.argv[2], 9, verbose=0)
cached = cache[0]["label"].tolist()
del sys.modules["tensorflow_datasets"]
source = data.tfds_source("imagenet2012", "train", 32, data_dir=sys.argv[1])
print(json.dumps([cached, [source.read(i)["label"] for i in range(len(source))]]))
"""


@pytest.mark.skipif(keras.config.backend() == "tensorflow", reason="Keras itself needs it there.")
def test_what_was_prepared_is_read_without_tensorflow_and_a_cache_without_both(
    imagenet, alone, tmp_path
):
    source = imagenet("train")
    write_cache(tmp_path, source)
    folder = imagenet.keywords["data_dir"]
    command = [sys.executable, "-c", WITHOUT_TENSORFLOW, folder, tmp_path]
    result = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    labels = [label for _, label in _numbers(source)]
    assert json.loads(result.stdout) == [labels, labels]


class TinyCaptions(tfds.core.GeneratorBasedBuilder):
    """A set with the features of `coco_captions`, really prepared: that one is a download."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "image/filename": tfds.features.Text(),
            "captions": tfds.features.Sequence({"id": np.int64, "text": np.str_}),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(4), "val": self._generate_examples(3)}

    def _generate_examples(self, count):
        for k in range(count):
            captions = [{"id": 10 * k + j, "text": f"café {k} {j}"} for j in range(1 + k)]
            image = grey(50 * k, 20 + k, 30)
            yield k, {"image": image, "image/filename": f"{k}.jpg", "captions": captions}


def test_captions_are_those_of_the_set_and_its_pictures_fitted_by_lanczos(tmp_path, monkeypatch):
    source = tfds_source("tiny_captions", "train+val", 16, data_dir=tmp_path)
    assert (len(source), source.num_classes) == (7, None)
    for k in range(7):
        own = source.read(k)["image"]
        assert own.shape == (16, 16, 3)
        number = own[0, 0, 0] // 50  # records come in an order of their own
        assert source.captions[k] == [f"café {number} {j}" for j in range(1 + number)]
    images = tfds_images("tiny_captions", 16, "val", data_dir=tmp_path, batch_size=2, verbose=0)
    assert set(images[0]) == {"image"}
    plain = tfds_source("tiny_captions", "val", 16, captions=None, data_dir=tmp_path)
    assert plain.captions is None
    methods, fitted = [], data.pictures.fitted
    monkeypatch.setattr(
        data.pictures, "fitted", lambda *given: methods.append(given[-1]) or fitted(*given)
    )
    for each in (source, plain):
        each.read(0)
    assert methods == ["lanczos", "adm"]
