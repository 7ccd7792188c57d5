"""What W&B, offline, and MLflow have stored; and fakes of loggers, with the calls that their documentation shows."""

import io
import struct
import sys
import types
from pathlib import Path

from lightning.pytorch.loggers.logger import Logger

BLOCK = 32768  # bytes of a block of W&B's file, which has records as those of LevelDB


def wandb_records(file):
    """The records of a ``.wandb`` file."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, content = Path(file).read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:  # too few bytes for a header
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if not kind:
            return
        content += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            yield Record.FromString(content)
            content = b""


def wandb_steps(file):
    """The steps under which charts show keys, and the names of the files of images, by key."""
    steps, images = {}, {}
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "history":
            row = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            step = row.get("trainer/global_step")
            for key in row:
                tag = key.removesuffix("/filenames")
                if tag != key:
                    images.setdefault(tag, []).extend(eval(row[key]))
                steps.setdefault(tag, []).append(None if step is None else int(step))
    return steps, images


class FakeLogger(Logger):
    """A logger that Lightning does not know, with nothing but numbers."""

    def __init__(self, experiment=None):
        super().__init__()
        self.experiment = experiment
        self.steps = {}

    name = version = None

    def log_metrics(self, metrics, step=None):
        for key in metrics:
            self.steps.setdefault(key, []).append(step)

    def log_hyperparams(self, *arguments, **options):
        pass


class CometExperiment:
    def __init__(self):
        self.figures, self.assets = [], []

    def log_figure(self, figure_name=None, figure=None, overwrite=False, step=None):
        figure.savefig(io.BytesIO(), format="svg")
        self.figures.append((figure_name, step))

    def log_asset(self, file_data, file_name=None, overwrite=False, copy_to_tmp=True, step=None, metadata=None):
        assert Path(file_data).stat().st_size
        self.assets.append((file_name, step))


def aim_experiment(monkeypatch):
    """The run of an AimLogger, and a module ``aim`` with images."""

    class Image:
        def __init__(self, image, caption="", format="png", quality=90, optimize=False):  # noqa: A002
            self.size, self.caption = image.size, caption

    class Run:
        def __init__(self):
            self.tracked = []

        def track(self, value, name=None, step=None, epoch=None, *, context=None):
            self.tracked.append((type(value).__name__, name, step, value.size))

    Run.__module__ = "aim.sdk.run"
    monkeypatch.setitem(sys.modules, "aim", types.ModuleType("aim"))
    sys.modules["aim"].Image = Image
    return Run()


class LitLoggerFake(FakeLogger):
    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        self.files = []

    @property
    def log_dir(self):
        return str(self.folder)

    def log_file(self, path):
        assert Path(path).stat().st_size
        self.files.append(path)


class Broken(FakeLogger):
    """A logger whose server does not answer."""

    def __init__(self):
        super().__init__(experiment=self)
        self.calls = 0

    def add_figure(self, *arguments, **options):
        self.calls += 1
        raise ConnectionError("no answer")
