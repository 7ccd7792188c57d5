"""Documentation: code blocks run, links lead somewhere, every public name has its place, the README is short."""

import dataclasses
import functools
import inspect
import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import get_origin

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_flatness as lf
import lightning_flatness.functional
import lightning_flatness.pages
import lightning_flatness.plots
import lightning_flatness.results
import lightning_flatness.testing

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# A comment above a block that is not run has the reason.
BLOCK = re.compile(r"((?:<!-- not run: [^\n]*-->\n\n)?)```python\n(.*?)```", flags=re.DOTALL)
SLOW = {"README.md", "index.md", "gallery.md"}  # they train for some epochs


def name_of(page):
    return page.relative_to(ROOT / "docs" if ROOT / "docs" in page.parents else ROOT).as_posix()


def blocks_of(page):
    return [code for note, code in BLOCK.findall(page.read_text()) if not note]


class Classifier(L.LightningModule):
    """A small network with the names that pages mention."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)
        self.fc = nn.Linear(4, 3)

    def forward(self, images):
        return self.fc(self.conv2(self.norm(self.conv1(images)).relu()).relu().mean((2, 3)))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def names():
    """Return what blocks of a page may use without defining it."""
    torch.manual_seed(0)
    images, labels = torch.randn(40, 1, 8, 8), torch.arange(40) % 3
    model, other = Classifier(), Classifier()
    loader = DataLoader(TensorDataset(images, labels), batch_size=20)
    features = torch.randn(40, 4)
    return {
        "L": L, "lf": lf, "torch": torch, "nn": nn,
        "model": model, "small_model": model, "sgd": model, "sam": other, "model_a": model, "model_b": other,
        "train_loader": loader, "val_loader": loader, "batches": [(images, labels)],
        "images": images, "inputs": images, "labels": labels, "targets": labels,
        "features": features, "logits": model.fc(features),
        "models": {"a": model, "b": other}, "gaps": {"a": 0.1, "b": 0.2},
        "backbone": nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), "classifier": nn.Linear(4, 3),
        "cross_entropy": nn.functional.cross_entropy,
    }  # fmt: skip


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] if name_of(page) in SLOW else [])
        for page in PAGES
        if blocks_of(page)
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_code_blocks_run(page, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    trainer = L.Trainer
    epochs = 3 if page.stem == "gallery" else 1  # a plane of principal directions needs three
    quiet = {"max_epochs": epochs, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    monkeypatch.setattr(L, "Trainer", lambda **options: trainer(**quiet | options))
    few = {"num_steps": 5, "num_probes": 2, "max_products": 9}
    monkeypatch.setattr(lf, "hessian_spectrum", partial(lf.hessian_spectrum, **few))
    monkeypatch.setattr(lf, "SpectrumCallback", partial(lf.SpectrumCallback, **few))
    monkeypatch.setattr(lf, "loss_landscape", partial(lf.loss_landscape, steps=5))
    known = names()
    for block in blocks_of(page):
        exec(compile(block, str(page), "exec"), known)


def anchors_of(page):
    """Return the anchors of a page's headings, as MkDocs and GitHub make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors_of(found), target


NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_notebooks_have_run_from_top_to_bottom(notebook):
    assert notebook.stat().st_size < 800_000
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_notebooks_for_colab_install_the_package_and_link_to_the_site(notebook, monkeypatch):
    pytest.importorskip("mkdocs")
    pytest.importorskip("nbconvert")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from hooks import for_colab

    made = json.loads(for_colab(notebook, "https://github.com/one/name", "https://one.github.io/name/"))
    (title, install, *others), (_, *expected) = made["cells"], json.loads(notebook.read_text())["cells"]
    assert title["cell_type"] == "markdown"
    assert "".join(install["source"]).endswith(
        'install --quiet "lightning-flatness[examples] @ git+https://github.com/one/name"'
    )
    assert [cell["source"] for cell in others if cell["cell_type"] == "code"] == [
        cell["source"] for cell in expected if cell["cell_type"] == "code"
    ]
    text = "".join(line for cell in made["cells"] if cell["cell_type"] == "markdown" for line in cell["source"])
    pages = re.findall(r"\]\(([^)#]*)", text)
    assert pages
    for page in pages:
        path = page.removeprefix("https://one.github.io/name/").rstrip("/")
        assert (ROOT / "docs" / f"{path}.md").exists() or (ROOT / f"{path}.ipynb").exists(), page


def test_the_gallery_has_every_figure():
    text = (ROOT / "docs" / "gallery.md").read_text()
    assert {name for name in lf.plots.__all__ if f"{name}(" not in text} == set()
    pictures = set((ROOT / "docs" / "images" / "gallery").iterdir())
    assert {ROOT / "docs" / path for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)} == pictures
    assert sum(picture.stat().st_size for picture in pictures) < 1_500_000


PUBLIC_MODULES = (lf.functional, lf.plots, lf.pages, lf.testing)


def entries():
    """Return what the reference has an entry for, without the name of the package."""
    text = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    return re.findall(r"^::: lightning_flatness\.([\w.]+)$", text, flags=re.MULTILINE)


def test_the_reference_has_every_public_name():
    assert {entry for entry in entries() if "." not in entry} == {*lf.__all__, "functional", "plots", "testing"}


@pytest.mark.parametrize("module", PUBLIC_MODULES, ids=lambda module: module.__name__)
def test_the_reference_has_every_name_of_public_modules(module):
    """It has those with a docstring of a module with an entry, but for functions with the name of a submodule."""
    room = module.__name__.partition(".")[2]
    package, found = loaded(ROOT), {entry.rpartition(".")[2] for entry in entries() if entry.startswith(f"{room}.")}
    if room in entries():
        members = {name: package[room][name] for name in module.__all__}
        found |= {name for name, member in members.items() if not member.is_module and member.docstring}
    assert set(module.__all__) - {*found, *entries()} == set()


# The entry of ``functional.patches``, which has the name of its submodule.
TWICE = "functional.patches.patches"


def public_callables():
    """Return all public functions and classes, by their names in the reference."""
    names = {name for name in entries() if name not in {module.__name__.partition(".")[2] for module in PUBLIC_MODULES}}
    for module in PUBLIC_MODULES:
        names |= {f"{module.__name__}.{name}".partition(".")[2] for name in module.__all__}
    found = {name: functools.reduce(getattr, name.split("."), lf) for name in sorted(names - {TWICE})}
    return {name: value for name, value in found.items() if callable(value) and get_origin(value) is None}


@pytest.mark.parametrize("name", public_callables())
def test_every_public_callable_has_an_example(name):
    text = inspect.getdoc(public_callables()[name])
    assert re.search(r"^Example:\n    >>> ", text, flags=re.MULTILINE)


def fields_of(owner):
    """Return the names of the fields of a dataclass or a named tuple."""
    is_dataclass = dataclasses.is_dataclass(owner)
    return [field.name for field in dataclasses.fields(owner)] if is_dataclass else list(getattr(owner, "_fields", ()))


RECORDS = {
    name: value
    for module in (lf, lf.functional, lf.results)
    for name, value in ((name, getattr(module, name)) for name in module.__all__)
    if inspect.isclass(value) and fields_of(value)
}


@pytest.mark.parametrize("name", RECORDS)
def test_every_field_has_a_description(name):
    described = re.findall(r"^    (\w+): \S", inspect.getdoc(RECORDS[name]), flags=re.MULTILINE)
    assert set(fields_of(RECORDS[name])) - set(described) == set()


def loaded(folder):
    """Return the package in a folder as the site reads it."""
    griffe = pytest.importorskip("griffe")
    pytest.importorskip("mkdocs")
    extensions = griffe.load_extensions(str(ROOT / "docs" / "docstrings.py"))
    options = {"search_paths": [folder], "try_relative_path": False}
    return griffe.load("lightning_flatness", extensions=extensions, **options)


def test_the_site_links_what_docstrings_name():
    package = loaded(ROOT)
    text = package["testing.oracle_block_traces"].docstring.value
    assert "[`hessian_rows`][lightning_flatness.testing.hessian_rows]" in text  # a name of its module
    assert "[Theory](../theory.md)" in text
    text = package["functional.penalty.target_sums"].docstring.value
    assert "[`flatness_penalty`][lightning_flatness.functional.flatness_penalty]" in text
    text = package["results.tables.LayerInfo"].docstring.value
    assert "    kind: *[](){#lightning_flatness.results.LayerInfo.kind}*name" in text


@pytest.mark.parametrize(
    "named", [":func:`no_such_name`", "``docs/no_such_page.md``", '``docs/theory.md``, "No section"']
)
def test_the_site_is_not_built_with_names_of_nothing(named, tmp_path):
    shutil.copytree(ROOT / "lightning_flatness", tmp_path / "lightning_flatness")
    with (tmp_path / "lightning_flatness" / "versions.py").open("a") as file:
        file.write(f'\n\ndef added():\n    """See {named}."""\n')
    with pytest.raises(Exception, match=rf"does not exist.*\n.*versions\.added: {re.escape(named)}"):
        loaded(tmp_path)


def test_docstrings_are_markdown():
    """The site shows reStructuredText and LaTeX as they are, but for roles."""
    for path in sorted((ROOT / "lightning_flatness").rglob("*.py")):
        assert not re.search(r"^ *\.\. \w+::|^ *===|\\(?:sum|frac) ?[_{]", path.read_text(), flags=re.MULTILINE), path


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
