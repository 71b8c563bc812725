"""The recipe of the model in the package.

    bash examples/emoji/fetch_data.sh data/emoji
    python -m examples.emoji.train_model --config=examples/emoji/recipe.py --data=data/emoji \
        --workdir=runs/emoji_model --output=alignprop_jax/assets/emoji
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

    scene_clip = config.scene_clip = ConfigDict()
    scene_clip.width = 128
    scene_clip.text_layers = 2
    scene_clip.vision_layers = 4
    scene_clip.num_heads = 4
    scene_clip.patch_size = 8
    scene_clip.scenes = ConfigDict(
        {"single": 0.25, "count": 0.2, "pair": 0.2, "colored": 0.1, "colored_pair": 0.25}
    )
    scene_clip.style_share = 0.1
    scene_clip.degraded_share = 0.15
    scene_clip.num_steps = 1800
    scene_clip.batch_size = 64
    scene_clip.learning_rate = 2e-3
    scene_clip.muon = True

    vae = config.vae = ConfigDict()
    vae.channels = (16, 32, 64)
    vae.scenes = ConfigDict()
    vae.latent_channels = 4
    vae.kl_weight = 1e-4
    vae.num_steps = 1000
    vae.batch_size = 16
    vae.learning_rate = 2e-3

    unet = config.unet = ConfigDict()
    unet.channels = (64, 96, 160)
    unet.num_heads = (2, 3, 5)
    # Mostly what the built-in prompts ask for: see scenes.py.
    unet.scenes = ConfigDict(
        {"single": 2.5, "featured_share": 0.9, "single_size": (56, 60), "max_shift": 1}
    )
    unet.num_scenes = 24_000  # encoded once, then drawn from
    unet.caption_dropout = 0.1
    unet.num_steps = 6000
    unet.batch_size = 32
    unet.learning_rate = 1.2e-3
    unet.muon = True

    # Then as often what pictures of one object do not teach: numbers, pairs and colours. Captions
    # misstate numbers as those of the web do, so that counting is left for tuning to improve.
    unet_scenes = config.unet_scenes = unet.copy_and_resolve_references()
    unet_scenes.scenes.update(
        count=1.0,
        pair=1.0,
        colored=0.2,
        on_background=0.1,
        colored_on_background=0.1,
        colored_pair=0.8,
        featured_share_of_scenes=0.95,
        scene_size=(30, 32),
        misstated_share=0.8,
    )
    unet_scenes.scenes.single = 1.0
    unet_scenes.num_scenes = 64_000
    unet_scenes.num_steps = 4500
    unet_scenes.learning_rate = 1e-3

    vae_scenes = config.vae_scenes = vae.copy_and_resolve_references()
    vae_scenes.scenes = unet_scenes.scenes
    vae_scenes.num_steps = 1500
    vae_scenes.muon = True

    decoder = config.decoder = ConfigDict()
    decoder.scenes = unet_scenes.scenes
    decoder.latent_noise = 0.05
    decoder.num_steps = 1500
    decoder.batch_size = 16
    decoder.learning_rate = 2e-3
    decoder.muon = True
    return config
