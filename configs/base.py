"""What the two experiments share. A preset is a short difference from the paper's experiment."""

import ml_collections
from ml_collections import config_dict


def paper() -> ml_collections.ConfigDict:
  """The keys that both tasks have: the paper's experiment, and our choice where it is silent (docs/paper.md)."""
  config = ml_collections.ConfigDict()
  config.task = ''  # segmentation or classification, set by seg.py and cls.py
  config.seed = 0

  config.model = ml_collections.ConfigDict()
  config.model.name = ''  # one of models.NAMES, set by the preset
  config.model.width = config_dict.placeholder(int)  # channels of the first level; None: the architecture's own
  config.model.encoder = config_dict.placeholder(str)  # of linknet, pspnet, deeplabv3: resnet18, resnet34, resnet50
  # Shallower than the architecture's own (None): of resunet the channels of each level over `width`, as (1, 2, 4) for
  # three levels; of resnet the blocks of each stage, as (2, 2) for two stages.
  config.model.multiples = config_dict.placeholder(tuple)
  config.model.stage_sizes = config_dict.placeholder(tuple)
  config.model.init_from = ''  # PyTorch weights to start from: .safetensors, .pth
  config.model.dtype = 'auto'  # of activations: bfloat16 on accelerators, float32 on CPU

  config.data = ml_collections.ConfigDict()
  config.data.raw_dir = ''  # CT and masks as released, in one of the layouts of docs/data.md
  config.data.lesion_labels = ()  # values of the masks that are lesion; () is what the cohort says
  config.data.intensity = 'hu'  # or 'grey': images of 0 to 255 that were windowed before, as PNG and JPEG are
  config.data.patients = 'named'  # or 'each_slice': slices of unknown patients may be dealt one by one
  config.data.dir = ''  # prepared dataset; '' is a cache folder keyed by raw_dir's files
  # Tested on; the next fold is validated on, the others are trained on. 'all': each fold in turn, and pooled.
  config.data.fold = config_dict.FieldReference(0, field_type=object)
  config.data.image_size = 512
  config.data.window = (-1000.0, 300.0)  # HU that the network tells apart
  config.data.balanced = True  # slices with and without a lesion 1:1 in training
  config.data.phantom = ml_collections.ConfigDict()  # of the demo's synthetic cohort
  config.data.phantom.patients = 100
  config.data.phantom.slices = 40
  config.data.phantom.seed = 0

  config.augment = ml_collections.ConfigDict()
  config.augment.crop_probability = 0.5
  config.augment.crop_fractions = (1 / 2, 1 / 4, 1 / 8)
  config.augment.flip = False
  config.augment.hu_shift = 0.0
  config.augment.hu_scale = 0.0

  config.train = ml_collections.ConfigDict()
  config.train.steps = 20_000
  config.train.batch_size = 16  # over all devices of all hosts
  # A name in fusa_jax/tasks/losses.py, set by seg.py and cls.py: cross_entropy, cross_entropy_dice, dice, focal.
  config.train.loss = ''
  config.train.optimizer = 'adamw'  # or 'sgd', with Nesterov momentum 0.99 (fusa_jax/training/optimizers.py)
  config.train.schedule = 'warmup_cosine'  # or 'polynomial', 'constant' (fusa_jax/training/optimizers.py)
  config.train.learning_rate = 1e-3  # the highest
  config.train.warmup_steps = 500  # of warmup_cosine; the other schedules have no warm-up
  config.train.weight_decay = 1e-4  # kernels only
  config.train.log_every = 50
  config.train.evaluate_every = 1000  # validation, then a checkpoint

  config.evaluate = ml_collections.ConfigDict()
  config.evaluate.num_overlays = 12
  # The operating point, chosen on the validation fold: the threshold of the best Dice; or, given a share, the highest
  # one that finds that share of the lesion pixels (classification: of the slices with lesion).
  config.evaluate.target_sensitivity = config_dict.placeholder(float)
  config.evaluate.fit_temperature = False  # calibrates probabilities on the validation fold; no ranking changes
  config.evaluate.flips = False  # the mean of slices as they are and mirrored left and right
  config.evaluate.lungs = False  # masks are limited to the lungs, found in the scan by their HU
  config.evaluate.fit_smallest = False  # lesions that are too small to be believed are left out, as validation says
  config.evaluate.prevalences = (0.01, 0.05, 0.1, 0.3, 0.5)  # shares of positive slices to give PPV and NPV for

  config.mesh = ml_collections.ConfigDict()
  config.mesh.data = -1  # devices that share a batch; -1: all that mesh.space leaves
  config.mesh.space = 1  # devices that share an image
  return config


def read_preset(preset: str, file: str, names: tuple[str, ...]) -> tuple[bool, str | None]:
  """(whether it is the demo's size, the model's name or None) of `paper`, `demo`, NAME or `demo-NAME`.

  Raises:
    ValueError: it is none of these.
  """
  name = preset.removeprefix('demo').removeprefix('-').removeprefix('paper')
  is_demo = preset.startswith('demo')
  if preset not in ('paper', 'demo', name, f'demo-{name}') or (name and name not in names):
    raise ValueError(
      f'{file} has no preset {preset!r}; one of paper, demo, a model, or demo- and a model: {", ".join(names)}'
    )
  return is_demo, name or None


def demo(config: ml_collections.ConfigDict) -> None:
  """A size for two CPU cores: narrow, on slices of 96 x 96."""
  config.model.width = 8
  config.data.image_size = 96
  # A 1/8 crop would have 12 pixels to enlarge.
  config.augment.crop_probability = 0.25
  config.augment.crop_fractions = (1 / 2,)
  config.augment.flip = True
  config.augment.hu_shift = 30.0
  config.augment.hu_scale = 0.05
  config.train.steps = 2400
  config.train.batch_size = 8
  config.train.learning_rate = 3e-3
  config.train.warmup_steps = 50
  config.train.log_every = 20
  config.train.evaluate_every = 600
