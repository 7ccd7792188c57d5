"""What the command line measures: the numbers of the functions of Python, on what validation steps are given."""

import warnings

import lightning as L
import pytest
import torch

import lightning_flatness as lf
from lightning_flatness.pages import data_hash
from tests.cli import project
from tests.cli.conftest import DATA
from tests.cli.project import DrawnSplit, Images, Net, Normalised, Preparing, quiet_trainer
from tests.guarding import guards

NET = ["--model", "tests.cli.project.Net"]
MEASURES = ("relative_flatness", "normalized_relative_flatness", "hessian_trace", "loss", "accuracy")


def model_of(kind, path, **arguments):
    model = kind(**arguments)
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return model


def loader(name="val", kind=Images):
    data = kind()
    data.setup("fit")
    return getattr(data, f"{name}_dataloader")()


def assert_same(found, report):
    for measure in MEASURES:
        assert found[measure] == pytest.approx(getattr(report, measure), rel=1e-12)
    assert found["num_samples"] == report.num_samples


def test_blanks_beside_the_commas_of_layers(runs, numbers):
    found = numbers("measure", runs / "small.ckpt", *NET, *DATA, "--layers", "net.0, net.2")
    assert list(found["layers"]) == ["net.0", "net.2"]


def test_measures_what_measure_flatness_measures(runs, numbers):
    found = numbers("measure", runs / "small.ckpt", *NET, *DATA, "--layers", "all")
    report = lf.measure_flatness(model_of(Net, runs / "small.ckpt"), loader(), layers="all")
    assert_same(found, report)
    assert list(found["layers"]) == ["net.0", "net.2", "net.6"]
    assert found["layers"]["net.2"]["sampling_errors"]["relative_flatness"] > 0
    assert found["data"] == "val"


@guards("cli/steps.py", "call = self._find_network(pl_module)", "call = None; self._find_network(pl_module)")
def test_the_network_is_given_what_the_step_gives_it(runs, numbers):
    found = numbers("measure", runs / "preparing.ckpt", "--model", "tests.cli.project.Preparing", *DATA)
    model = model_of(Preparing, runs / "preparing.ckpt")
    assert_same(found, lf.measure_flatness(model, [(model.prepared(x), y) for x, y in loader()]))
    callback = lf.FlatnessCallback(live=False, summary=False, figures=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet_trainer(callbacks=[callback]).validate(model, loader(), verbose=False)
    assert_same(found, callback.report)


def test_the_batch_as_it_is(runs, numbers):
    words = ["measure", runs / "preparing.ckpt", "--model", "tests.cli.project.Preparing", *DATA, "--inputs", "batch"]
    report = lf.measure_flatness(model_of(Preparing, runs / "preparing.ckpt"), loader())
    assert_same(numbers(*words), report)
    named = numbers(*words, "--network", "net")
    assert_same(named, report)
    assert list(named["layers"]) == ["2"]


@guards("cli/steps.py", "trainer.validate(module, datamodule=split.data", "trainer.validate(module, split.loader")
def test_hooks_of_the_data_move_batches(runs, numbers):
    found = numbers("measure", runs / "small.ckpt", *NET, "--data", "tests.cli.project.Normalised")
    batches = [(x / 2, y) for x, y in loader(kind=Normalised)]
    assert_same(found, lf.measure_flatness(model_of(Net, runs / "small.ckpt"), batches))


def test_training_data_are_a_fixed_subset(runs, numbers):
    words = ["measure", runs / "small.ckpt", *NET, *DATA, "--split", "train"]
    whole, part = numbers(*words), numbers(*words, "--max-samples", 10)
    data = Images()
    data.setup("fit")
    report = lf.measure_flatness(model_of(Net, runs / "small.ckpt"), [list(zip_batch(data.train))])
    assert whole["relative_flatness"] == pytest.approx(report.relative_flatness, rel=1e-5)  # in other batches
    assert whole["num_samples"] == 24
    assert part["num_samples"] == 10
    assert part == numbers(*words, "--max-samples", 10) | {"details": part["details"]}


def zip_batch(dataset):
    images, labels = zip(*dataset, strict=True)
    return torch.stack(images), torch.stack(labels)


def test_several_loaders_are_counted_from_zero(runs, run, numbers):
    words = ["measure", runs / "small.ckpt", *NET, "--data", "tests.cli.project.TwoLoaders"]
    second = numbers(*words, "--loader", 1)
    assert_same(second, lf.measure_flatness(model_of(Net, runs / "small.ckpt"), loader()))
    assert numbers(*words)["loss"] != second["loss"]
    code, _, err = run(*words, "--loader", 2)
    assert code == 1
    assert "--loader 2: the val data have 2 loaders; the first is --loader 0." in err


def test_the_step_is_told_its_loader(runs, numbers):
    words = ["--model", "tests.cli.project.Numbered", "--data", "tests.cli.project.TwoLoaders", "--loader", 1]
    found = numbers("measure", runs / "small.ckpt", *words)
    assert_same(found, lf.measure_flatness(model_of(Net, runs / "small.ckpt"), [(2 * x, y) for x, y in loader()]))


def test_a_loss_of_the_users(runs, numbers):
    found = numbers(
        "measure", runs / "small.ckpt", *NET, *DATA, "--loss", "tests.cli.project.focal", "--dtype", "float64"
    )
    model = model_of(Net, runs / "small.ckpt")
    assert_same(found, lf.measure_flatness(model, loader(), loss=project.focal, dtype="float64"))


@pytest.mark.parametrize("name", ["plain.pt", "plain.safetensors", "nested.pth"])
@pytest.mark.parametrize("kind", ["Plain", "plain"])
def test_weights_alone(runs, numbers, tmp_path, name, kind):
    state = torch.load(runs / "plain.pt", weights_only=True)
    path = tmp_path / name
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save({"model": state, "epoch": 3} if name == "nested.pth" else state, path)
    found = numbers("measure", path, "--model", f"tests.cli.project.{kind}", "--model.width", 2, *DATA)
    model = project.Plain()
    model.load_state_dict(state)
    assert_same(found, lf.measure_flatness(model, loader()))


def test_a_checkpoint_that_a_hook_changes(runs, numbers, tmp_path):
    content = torch.load(runs / "small.ckpt", weights_only=True)
    state = {name.replace("net.", "body."): value for name, value in content["state_dict"].items()}
    torch.save({**content, "state_dict": state}, tmp_path / "old.ckpt")
    found = numbers("measure", tmp_path / "old.ckpt", "--model", "tests.cli.project.Renamed", *DATA)
    assert_same(found, lf.measure_flatness(model_of(Net, runs / "small.ckpt"), loader()))


def test_versions_of_modules_are_loaded(numbers, tmp_path):
    model = project.versioned()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    found = numbers("measure", tmp_path / "model.pt", "--model", "tests.cli.project.versioned", *DATA)
    assert_same(found, lf.measure_flatness(model, loader()))


def test_a_comparison_names_the_class_of_every_network(cli_run, numbers, tmp_path):
    content = torch.load(cli_run / "last.ckpt", weights_only=False)
    content["hyper_parameters"]["_class_path"] = "tests.cli.project.Preparing"
    torch.save(content, tmp_path / "other.ckpt")
    found = numbers("compare", cli_run / "last.ckpt", tmp_path / "other.ckpt", "--no-train-loss")
    names = "last: tests.cli.project.Net, other: tests.cli.project.Preparing"
    assert found["details"]["Model"] == names


def test_a_checkpoint_of_a_lightning_cli_knows_its_classes(cli_run, numbers):
    found = numbers("measure", cli_run / "last.ckpt")
    assert found["num_samples"] == 16
    report = lf.measure_flatness(model_of(Net, cli_run / "last.ckpt", width=4), with_size(16))
    assert_same(found, report)
    assert found["details"]["Model"] == "tests.cli.project.Net"


def with_size(size):
    data = Images(size)
    data.setup("fit")
    return data.val_dataloader()


def test_a_config_says_the_classes_and_the_checkpoint_its_arguments(runs, cli_run, numbers):
    config = ["--config", cli_run / "config.yaml"]
    found = numbers("measure", runs / "wide.ckpt", *config, "--data.size", 20)  # width 3, not the config's 4
    assert_same(found, lf.measure_flatness(model_of(Net, runs / "wide.ckpt", width=3), with_size(20)))
    assert found["details"]["Seed of the measurement"] == "5"


def test_arguments_of_another_class_are_not_the_checkpoints(cli_run, numbers):
    found = numbers("measure", cli_run / "last.ckpt", "--data", "tests.cli.project.Normalised")
    assert found["num_samples"] == 24  # not the 16 that Images was given


def test_a_spectrum(runs, numbers):
    found = numbers("spectrum", runs / "small.ckpt", *NET, *DATA, "--top-k", 2, "--steps", 5, "--probes", 2)
    model = model_of(Net, runs / "small.ckpt")
    own = lf.hessian_spectrum(model, list(loader()), top_k=2, num_steps=5, num_probes=2)
    assert found["eigenvalues"] == pytest.approx(own.eigenvalues.tolist(), rel=1e-12)
    assert found["trace"] == pytest.approx(own.trace, rel=1e-12)
    assert next(iter(found["parameters"])) == "net.0.weight"


@pytest.mark.parametrize("words", [["--line"], ["--axes", "hessian"]])
def test_a_landscape(runs, tmp_path, run, words):
    path = tmp_path / "plane.npz"
    command = ["landscape", runs / "small.ckpt", *NET, *DATA, "--steps", 3, "--span", 0.5, "-o", path, *words]
    assert run(*command)[0] == 0
    result = lf.LandscapeResult.load(path)
    axes = ["random"] if words == ["--line"] else ["hessian"] * 2
    own = lf.loss_landscape(model_of(Net, runs / "small.ckpt").net, list(loader()), axes=axes, steps=3, span=0.5)
    torch.testing.assert_close(result.losses, own.losses, rtol=1e-12, atol=0)


@guards("cli/commands.py", "same_samples=same_samples", "same_samples=False")  # both networks find one class alone
def test_compares_on_the_same_samples(runs, numbers):
    words = ["compare", runs / "small.ckpt", runs / "wide.ckpt", *NET, *DATA]
    found = numbers(*words)
    assert list(found["models"]) == ["small", "wide"]
    assert found["is_paired"]
    for name, width in {"small": 2, "wide": 3}.items():
        model = model_of(Net, runs / f"{name}.ckpt", width=width)
        report = lf.measure_flatness(model, loader())
        for measure in MEASURES:
            assert found["models"][name][measure] == pytest.approx(getattr(report, measure), rel=1e-12)
        data = Images()
        data.setup("fit")
        images, labels = zip_batch(data.train)
        train_loss = torch.nn.functional.cross_entropy(model(images).double(), labels).detach()
        assert found["models"][name]["train_loss"] == pytest.approx(float(train_loss), rel=1e-6)
    assert numbers(*words, "--no-train-loss")["models"]["small"]["train_loss"] is None


def test_networks_that_are_given_other_inputs_are_noted(runs, numbers):
    preparing = ["--model", "tests.cli.project.PreparesByWidth", *DATA]
    found = numbers("compare", runs / "small.ckpt", runs / "wide.ckpt", *preparing, "--no-train-loss")
    assert found["notes"] == ["The networks were not given the same inputs: see the hash of the data of each."]
    assert found["details"]["Hash of the data"].startswith("small: ")


@pytest.mark.parametrize("split", ["val", "train"])
def test_a_module_with_data_and_a_late_network_of_its_own(runs, numbers, split):
    found = numbers("measure", runs / "small.ckpt", "--model", "tests.cli.project.Whole", "--split", split)
    assert found["num_samples"] == 24
    if split == "val":
        assert_same(found, lf.measure_flatness(model_of(Net, runs / "small.ckpt"), loader()))


def drawn_split(model):
    """The model, and the data that are drawn after it, as at the start of a run."""
    L.seed_everything(0, verbose=False)
    net, data = model(), DrawnSplit()
    data.setup("fit")
    return net, data


OWN_DATA = [["--model", "tests.cli.project.OwnData"], [*NET, "--data", "tests.cli.project.DrawnSplit"]]


def test_a_module_with_data_of_its_own_sets_them_up_once(runs, numbers):
    found = numbers("measure", runs / "small.ckpt", *OWN_DATA[0])
    assert found["details"]["Hash of the data"] == data_hash(drawn_split(Net)[1].val_dataloader())


@guards("cli/session.py", "if weights is not None:", "if False:")
def test_setup_does_not_change_the_weights_of_the_checkpoint(runs, numbers):
    actual = numbers("measure", runs / "small.ckpt", "--model", "tests.cli.project.Initialises")
    assert actual["loss"] == numbers("measure", runs / "small.ckpt", *NET, *DATA)["loss"]


@guards("cli/session.py", "if owner is not self._owner:", "if True:")
@pytest.mark.parametrize("words", OWN_DATA, ids=["module", "data module"])
def test_training_data_are_of_the_same_drawn_split(runs, numbers, words):
    found = numbers("compare", runs / "small.ckpt", runs / "small.ckpt", *words)
    images, labels = zip_batch(drawn_split(Net)[1].train)
    logits = model_of(Net, runs / "small.ckpt")(images).double()
    expected = pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels).detach()), rel=1e-6)
    assert [row["train_loss"] for row in found["models"].values()] == [expected, expected]


@guards("cli/session.py", "seed_all(self.seed)\n        model", "model")
def test_a_split_drawn_from_the_global_generator_is_that_of_the_run(cli_run, numbers):
    words = ["--config", cli_run / "config.yaml", "--data", "tests.cli.project.DrawnSplit", "--data.size", 16]
    found = numbers("measure", cli_run / "last.ckpt", *words)
    L.seed_everything(5, verbose=False)
    Net(width=4)
    data = DrawnSplit(16)
    data.setup("fit")
    assert found["details"]["Hash of the data"] == data_hash(data.val_dataloader())


@guards("cli/steps.py", "batch_fn=None if targets is None else targets_at(targets, has_steps)", "batch_fn=None")
@pytest.mark.parametrize("words", [[], ["--inputs", "batch"]], ids=["step", "batch"])
def test_targets_may_have_any_name(runs, numbers, words):
    net, data = "tests.cli.project.OfSpecies", "tests.cli.project.Species"
    expected = numbers("measure", runs / "small.ckpt", "--model", "tests.cli.project.Net", *DATA)
    named = numbers("measure", runs / "small.ckpt", "--model", net, "--data", data, "--targets", "species", *words)
    by_position = numbers("measure", runs / "small.ckpt", "--model", "tests.cli.project.Net", *DATA, "--targets", "1")
    assert named["layers"] == by_position["layers"] == expected["layers"]
    assert named["accuracy"] == expected["accuracy"]


def test_data_may_be_made_by_a_function(runs, numbers):
    words = ["measure", runs / "small.ckpt", "--model", "tests.cli.project.Net", "--data"]
    assert numbers(*words, "tests.cli.project.images")["layers"] == numbers(*words, DATA[1])["layers"]
