"""The volume of the tests: the demo's model and data, the same model cut short, one that sees, and images for it."""

from pathlib import Path
from tempfile import TemporaryDirectory

from demo import assets, volume
from demo.kube import Kubectl as DemoKubectl
from tests import easy_vqa
from tests.e2e.jobs import SEEING, SMALL
from tests.e2e.kube import Kubectl
from tests.trainer import tiny

TOOLBOX = volume.POD
"""A pod with the trainer's image that mounts the volume at /mnt."""

_CUT = """
import pathlib, sys
source, target = sys.argv[1:]
if pathlib.Path(target, "tokenizer.json").exists():
    sys.exit()
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
model.model.layers = model.model.layers[:2]
model.config.num_hidden_layers = 2
if getattr(model.config, "layer_types", None):
    model.config.layer_types = model.config.layer_types[:2]
model.save_pretrained(target)
AutoTokenizer.from_pretrained(source).save_pretrained(target)
"""

_SEE = """
import pathlib, sys
sys.path.insert(0, "/tmp/tests")
import tiny
tiny.make_llava(pathlib.Path(sys.argv[1]))
"""


def fill(kubectl: Kubectl, image: str, log: Path) -> None:
    """Makes the claim, the toolbox and the models and data on the volume; removes the results of earlier runs."""
    client = DemoKubectl(kubectl.binary, kubectl.kubeconfig, kubectl.namespace, log)
    packaged = assets.fetch(log)
    volume.fill(client, image, packaged)
    volume.start_pod(client, image)
    kubectl.exec(TOOLBOX, "sh", "-c", "rm -rf /mnt/outputs /mnt/checkpoints /mnt/datasets/bad /mnt/datasets/easy-vqa")
    kubectl.exec(TOOLBOX, "python", "-c", _CUT, f"/mnt/models/{assets.MODEL}", _path(SMALL))
    client.send({"tiny.py": Path(str(tiny.__file__))}, TOOLBOX, "/tmp/tests")
    kubectl.exec(TOOLBOX, "python", "-c", _SEE, _path(SEEING))
    with TemporaryDirectory() as folder:
        images = easy_vqa.write(Path(folder) / "easy-vqa", packaged.packages, train=40, held_out=8)
        client.send({"easy-vqa": images}, TOOLBOX, "/mnt/datasets")


def _path(uri: str) -> str:
    return f"/mnt/{uri.split('/', 3)[3]}"
