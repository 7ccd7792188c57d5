"""Runs that LightningCLI sets up from a YAML file."""

import yaml
from lightning.pytorch.cli import LightningCLI

from tests.callbacks.lightning_modules import WithData


def write_config(folder, callbacks):
    """A quiet Trainer with callbacks of ours, given as a dict from their names to their arguments."""
    listed = [{"class_path": f"lightning_flatness.{name}", "init_args": given} for name, given in callbacks.items()]
    quiet = dict.fromkeys(["enable_progress_bar", "logger", "enable_checkpointing"], False)
    trainer = {"accelerator": "cpu", "max_epochs": 2, "default_root_dir": str(folder), "callbacks": listed, **quiet}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"trainer": trainer}))
    return str(path)


def trainer_of(folder, callbacks, run=True):
    """The Trainer, after a fit or without one."""
    arguments = [*(["fit"] if run else []), "--config", write_config(folder, callbacks)]
    return LightningCLI(WithData, args=arguments, run=run, save_config_callback=None).trainer
