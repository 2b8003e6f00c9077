"""The training of monai_trainer.py from the configuration of a bundle, monai_bundle.json."""

from pathlib import Path

from monai.bundle import ConfigParser
from toy import dice

CONFIG = Path(__file__).with_suffix(".json")


def main(**changes: object) -> float:
    parser = ConfigParser()
    parser.read_config(CONFIG)
    parser.update(changes)  # keys as on the command line of `python -m monai.bundle run`: max_epochs, consistency, "optimizer#lr"
    parser.get_parsed_content("run")
    return dice(parser.get_parsed_content("network"))


if __name__ == "__main__":
    main()
