"""A detector as transformers saves one, with random weights and a real tokenizer."""

import json
import shutil

from alignprop_jax.loading.pretrained import resolve_model
from tests.nn.test_owlvit import TEXT, VISION, build_peer


def write_owl_folder(folder, model_type="owlvit"):
    """Writes the folder and returns transformers' model."""
    tokenizer = resolve_model("emoji") / "tokenizer"
    vocabulary = json.loads((tokenizer / "vocab.json").read_text())
    text = {**TEXT, "vocab_size": len(vocabulary), "max_position_embeddings": 16}
    peer = build_peer(model_type, text, VISION)
    peer.save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    size = VISION["image_size"]
    processor = {
        "size": {"height": size, "width": size},
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
        "do_center_crop": False,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return peer
