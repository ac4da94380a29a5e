"""Write the card of a trained model of MNIST's digits, in Markdown.

    python scripts/card.py FOLDER > CARD.md

FOLDER has the files of a model: outputs/RUN_ID/model.
"""

import argparse
from importlib.metadata import version
from pathlib import Path

from mnist_exp.metrics import format_metric
from mnist_exp.paths import DISTRIBUTION, NAME
from mnist_exp.tracking.models import read_model

CARD = """\
# Handwritten digits, {distribution} {version}

A convolutional network of {parameters:,} parameters. It maps images of {side} x {side} gray pixels to the classes {classes}.

## Results

| metric | value |
| --- | --- |
{metrics}

n = 1: one run with one seed. Other seeds give other values.

## Data

{name}: trained on the splits {trained_on}, scored once on `test`. Digests: {digests}.
{warning}
## Load it

Install the wheel of this release, and extract the model:

```bash
pip install {wheel}
python -m {package}.predict --model model photo.jpg
```

```python
from {package}.api import load

print(load("model")(["photo.jpg"]).labels)
```

Loading executes nothing that comes with the model.

## Use and limits

The model is an example for teaching, and a baseline for experiments. It expects one digit per picture. It gives a class to
everything, also to letters, several digits or no digit. Its probabilities are calibrated for MNIST's test images, not for your
pictures: score it on your own before you use it. Do not let it decide about people, money or health.

## License

MIT, as the code. MNIST is by Yann LeCun and Corinna Cortes, under CC BY-SA 3.0.
"""


def card(folder: Path) -> str:
    """Return the card of the model in a folder."""
    model, data, metrics = read_model(folder)
    release = version(DISTRIBUTION)
    return CARD.format(
        distribution=DISTRIBUTION,
        version=release,
        package=NAME,
        wheel=f"{NAME}-{release}-py3-none-any.whl",
        parameters=sum(value.numel() for value in model.parameters()),
        side=data.side,
        classes=", ".join(data.class_names),
        metrics="\n".join(f"| {name} | {format_metric(name, value)} |" for name, value in metrics.items()),
        name=data.name,
        trained_on=", ".join(f"`{split}`" for split in data.trained_on),
        digests=", ".join(f"{split} `{digest}`" for split, digest in data.digests.items()),
        warning=f"\n**{data.warning}**\n" if data.warning else "",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    print(card(parser.parse_args().folder), end="")
