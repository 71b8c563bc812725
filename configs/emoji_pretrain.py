"""The recipe of the model in the package.

    bash launch/fetch_emoji.sh data/emoji
    python -m alignprop_jax.pretrain --config=configs/emoji_pretrain.py --data=data/emoji \
        --workdir=runs/emoji_pretrain --output=alignprop_jax/assets/emoji
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0

    clip = config.clip = ConfigDict()
    clip.width = 128
    clip.text_layers = 3
    clip.vision_layers = 4
    clip.num_heads = 4
    clip.patch_size = 8
    clip.style_share = 0.2  # captions that tell the style
    clip.degraded_share = 0.1  # scenes that are spoilt, and captions that say so
    clip.num_steps = 600
    clip.batch_size = 64
    clip.learning_rate = 1e-3

    vision = config.vision = ConfigDict()
    vision.style_share = 0.5
    vision.degraded_share = 0.35
    vision.num_steps = 1500
    vision.batch_size = 64
    vision.learning_rate = 2e-3
    vision.muon = True

    head = config.aesthetic_head = ConfigDict()
    head.widths = (128, 128, 64, 32, 16, 1)
    head.num_scenes = 6400
    head.spoilt_share = 0.3
    head.num_steps = 2000
    head.batch_size = 256
    head.learning_rate = 1e-3

    detector = config.detector = ConfigDict()
    detector.scenes = ConfigDict({"single": 0.5, "count": 0.6, "pair": 0.6, "colored_pair": 0.1})
    detector.noise = 0.06  # added to pixel values, as sampled pictures are never clean
    detector.num_steps = 2000
    detector.batch_size = 64
    detector.learning_rate = 2e-3
    detector.muon = True

    vae = config.vae = ConfigDict()
    vae.channels = (16, 32, 64)
    vae.latent_channels = 4
    vae.kl_weight = 1e-4
    vae.num_steps = 1000
    vae.batch_size = 16
    vae.learning_rate = 2e-3

    unet = config.unet = ConfigDict()
    unet.channels = (64, 96, 160)
    unet.num_heads = (2, 3, 5)
    # Mostly what the built-in prompts ask for: see pretraining/scenes.py.
    unet.scenes = ConfigDict(
        {"single": 2.5, "featured_share": 0.9, "single_size": (56, 60), "max_shift": 1}
    )
    unet.num_scenes = 24_000  # encoded once, then drawn from
    unet.caption_dropout = 0.1
    unet.num_steps = 6000
    unet.batch_size = 32
    unet.learning_rate = 1.2e-3
    unet.muon = True

    # Then as often what pictures of one object do not teach: numbers, pairs and colours.
    unet_scenes = config.unet_scenes = unet.copy_and_resolve_references()
    unet_scenes.scenes.update(
        single=1.2,
        count=0.5,
        pair=0.5,
        colored=0.2,
        on_background=0.1,
        colored_on_background=0.1,
        colored_pair=0.3,
    )
    unet_scenes.num_scenes = 48_000
    unet_scenes.num_steps = 3600
    unet_scenes.learning_rate = 1e-3

    decoder = config.decoder = ConfigDict()
    decoder.scenes = unet_scenes.scenes
    decoder.latent_noise = 0.05
    decoder.num_steps = 1500
    decoder.batch_size = 16
    decoder.learning_rate = 2e-3
    decoder.muon = True
    return config
