"""The config keys of both tasks, with the values of the paper's experiment. A preset changes some of them."""

from typing import NamedTuple

import ml_collections
from ml_collections import config_dict


def paper() -> ml_collections.ConfigDict:
  """Returns the config of the paper's experiment; where the paper names no value, with ours (docs/paper.md)."""
  config = ml_collections.ConfigDict()
  config.task = ''  # 'segmentation' or 'classification'; configs/seg.py and configs/cls.py set it
  config.seed = 0  # seed of the initial weights, the order of the slices, augmentation and dropout

  config.model = ml_collections.ConfigDict()
  config.model.name = ''  # a model of docs/models.md; the preset sets it
  config.model.width = config_dict.placeholder(int)  # channels of the first level; None: as published
  # The encoder of linknet, pspnet or deeplabv3: 'resnet18', 'resnet34' or 'resnet50'; None: the model's default.
  config.model.encoder = config_dict.placeholder(str)
  # Depth of a ResUnet: the channels of each level, divided by width; (1, 2, 4) gives three levels. None: as published.
  config.model.multiples = config_dict.placeholder(tuple)
  # Depth of a ResNet: the number of blocks in each stage; (2, 2) gives two stages. None: as published.
  config.model.stage_sizes = config_dict.placeholder(tuple)
  config.model.init_from = ''  # file of PyTorch weights to start from, .safetensors or .pth; '': random weights
  config.model.dtype = 'auto'  # of activations: 'float32', 'bfloat16'; 'auto': float32 on CPU, bfloat16 elsewhere

  config.data = ml_collections.ConfigDict()
  config.data.raw_dir = ''  # folder of the CT scans and masks as released, in a layout of docs/data.md
  config.data.lesion_labels = ()  # mask values that count as lesion; (): as docs/data.md says for the layout
  # Several classes: mask values by name, for example {'ground glass': (1,), 'consolidation': (2,)}. A value may belong
  # to several classes. 'background' names values of no class; a value without a name is an error. (): one class.
  # Classification: names without values, as ('normal', 'COVID', 'other'), are exclusive classes of slices or patients.
  # 'auto' (cls.py): those of the cohort (docs/data.md); config.json has their names.
  config.data.classes = config_dict.FieldReference((), field_type=object)
  config.data.ignore_label = config_dict.placeholder(int)  # mask value of pixels to leave out; None: there is none
  config.data.intensity = 'hu'  # 'hu', or 'grey': 8-bit images (0 to 255), which were windowed before
  # Slices of unknown patients: 'named' leaves them out, 'each_slice' treats each of them as a separate patient.
  config.data.patients = 'named'
  config.data.coloured = 'refuse'  # pictures in colour (arrows, letters): 'refuse' or 'leave_out'
  config.data.dir = ''  # folder of the prepared dataset; '': a cache folder that depends on the files in raw_dir
  # The fold to test on, 0 or higher. The next fold is for validation, the others are for training. 'all' trains and
  # tests a run for each fold, and pools their results (cross-validation).
  config.data.fold = config_dict.FieldReference(0, field_type=object)
  config.data.image_size = 512  # side of the square slices, in pixels
  # Neighbouring slices on each side that the model sees beside a slice, as further channels (2.5D); 0: the slice alone.
  config.data.context = 0
  config.data.context_mm = 10.0  # slices farther away than this, in mm, are not neighbours
  config.data.window = (-1000.0, 300.0)  # lower and upper limit, in HU; the network input is clipped to this range
  # Train on slices with and without lesion in the ratio 1:1, or on each exclusive class equally often; False: in the
  # data's ratio.
  config.data.balanced = True
  config.data.phantom = ml_collections.ConfigDict()  # the synthetic cohort of the demo
  config.data.phantom.patients = 120  # number of patients
  config.data.phantom.slices = 24  # slices per patient
  config.data.phantom.seed = 0  # seed of the drawn patients
  config.data.phantom.kinds = False  # mark consolidations with 2, other lesions with 1

  config.augment = ml_collections.ConfigDict()  # random changes to each training slice
  config.augment.crop_probability = 0.5  # probability of a crop, which is resized to the whole slice; 0: no crops
  config.augment.crop_fractions = (1 / 2, 1 / 4, 1 / 8)  # possible sides of a crop, as fractions of the slice's side
  config.augment.flip = False  # mirror half of the slices left to right
  config.augment.hu_shift = 0.0  # largest shift in HU, up or down, of a whole slice; 0: none
  config.augment.hu_scale = 0.0  # largest relative change of contrast around water; 0.05 is 5%; 0: none
  # From here, each part is off unless its probability is above 0. docs/recipe.md says what each part costs.
  config.augment.affine_probability = 0.0  # probability of a rotation, scaling and shear about the centre
  config.augment.rotation = 15.0  # largest angle in degrees, in both directions
  config.augment.scaling = (0.8, 1.25)  # smallest and largest magnification, within 0.5 to 2
  config.augment.shear = 0.0  # largest shift per row, in pixels, in both directions
  config.augment.noise_probability = 0.0  # probability of Gaussian noise
  config.augment.noise = 60.0  # largest standard deviation of the noise, in HU
  config.augment.blur_probability = 0.0  # probability of a Gaussian blur
  config.augment.blur = (0.5, 1.0)  # smallest and largest standard deviation of the blur, in pixels
  config.augment.low_resolution_probability = 0.0  # probability of a lower resolution, resized back
  config.augment.low_resolution = (0.5, 1.0)  # its smallest and largest side, as fractions of the slice's side
  config.augment.contrast_probability = 0.0  # probability of another contrast around the mean of the windowed slice
  config.augment.contrast = (0.75, 1.25)  # smallest and largest factor of the contrast
  config.augment.gamma_probability = 0.0  # probability of a power of the windowed values, scaled to 0 to 1
  config.augment.gamma = (0.7, 1.5)  # smallest and largest power
  config.augment.gamma_inverted = 0.25  # probability that the power applies to 1 - value

  config.train = ml_collections.ConfigDict()
  config.train.steps = 20_000  # number of training steps; fixed once a run has started
  # Number of epochs, in place of train.steps if given. An epoch has as many slices as the training folds.
  config.train.epochs = config_dict.placeholder(float)
  # Ends the run early after so many validations below the best score; None: never. The schedule does not change.
  config.train.patience = config_dict.placeholder(int)
  config.train.batch_size = 16  # slices per step, over all devices of all hosts
  # 'cross_entropy', 'cross_entropy_dice', 'dice', 'focal', 'focal_dice', 'tversky' or 'focal_tversky'
  # (fusa_jax/tasks/losses.py); seg.py and cls.py set it.
  config.train.loss = ''
  # Deep supervision: lower levels of a ResUNet also predict masks, in training only (fusa_jax/tasks/supervision.py).
  config.train.deep_supervision = False
  config.train.optimizer = 'adamw'  # 'adamw', or 'sgd' with Nesterov momentum 0.99
  config.train.schedule = 'warmup_cosine'  # of the learning rate: 'warmup_cosine', 'polynomial' or 'constant'
  config.train.learning_rate = 1e-3  # the highest learning rate of the schedule
  config.train.warmup_steps = 500  # steps of linear warm-up, for warmup_cosine only
  config.train.weight_decay = 1e-4  # applies to kernels only, not to biases and norms
  # Scales gradients down to this norm over all parameters if theirs is larger; None: never.
  config.train.clip_norm = config_dict.placeholder(float)
  # Decay per step of a moving average of weights and running statistics; 0: none. With 0.999 it covers about the latest
  # 1000 steps. The average is validated, tested and exported. It costs the memory of another copy of the weights.
  config.train.ema = 0.0
  config.train.log_every = 50  # steps between two lines of the log
  config.train.evaluate_every = 1000  # steps between two validations; each is followed by a checkpoint
  # On GPUs: add in a fixed order and choose kernels without timing them, so that a repeated run gives the same bits
  # (docs/models.md has cost and limits). On CPUs and TPUs this key changes nothing.
  config.train.deterministic = False
  # Save memory, for larger batches: keep only the input of each residual block for the backward pass, and compute the
  # rest again (docs/models.md has cost and gain). For the ResNets and ResUnets.
  config.train.remat = False

  config.evaluate = ml_collections.ConfigDict()
  config.evaluate.num_overlays = 12  # pictures of test slices to draw
  # How the threshold is chosen on the validation fold. None: the best Dice (classification: F1). A number above 0, up
  # to 1: the highest threshold with at least this sensitivity, over pixels (classification: over slices). The threshold
  # of patients is chosen in the same way, over patients.
  config.evaluate.target_sensitivity = config_dict.placeholder(float)
  config.evaluate.fit_temperature = False  # calibrate the probabilities on the validation fold; ranks do not change
  config.evaluate.flips = False  # average the probabilities of each slice and its left-right mirror image
  config.evaluate.lungs = False  # limit masks to the lungs, which are segmented by HU
  config.evaluate.fit_smallest = False  # leave out small lesions; the validation fold decides below which volume
  # The score of a patient: 'mean_of_highest', 'noisy_or' or 'maximum' of the slices; or of the mask 'lesion_ml' or
  # 'lung_share'. '': the lesion volume if masks and scans are at hand, else 'mean_of_highest'.
  config.evaluate.patient_score = ''
  # Shares of slices, and of patients, with lesion to compute PPV and NPV for.
  config.evaluate.prevalences = (0.01, 0.05, 0.1, 0.3, 0.5)

  config.mesh = ml_collections.ConfigDict()
  config.mesh.data = -1  # devices that a batch is split over; -1: all devices / mesh.space
  config.mesh.space = 1  # devices that each image is split over, along its height
  return config


class Preset(NamedTuple):
  """What the name of a preset says.

  Attributes:
    is_demo: whether it has demo size.
    is_strong: whether it has the strong recipe.
    has_classes: whether it has two classes of lesions.
    model: the name of the model, or None for the default.
  """

  is_demo: bool
  is_strong: bool
  has_classes: bool
  model: str | None


def read_preset(preset: str, file: str, names: tuple[str, ...], classes: bool = False) -> Preset:
  """Reads a preset: `paper`, or one or several of `demo`, `strong`, `classes` and MODEL, in this order, with hyphens.

  `classes` needs `demo`: the classes of your own masks are in data.classes.

  Args:
    preset: the preset, for example `demo-strong-resunet`.
    file: the config file, for the error message.
    names: the models that MODEL can be.
    classes: whether the file has presets with `classes`.

  Raises:
    ValueError: the preset has none of these forms, or MODEL is not in `names`.
  """
  words = [] if preset == 'paper' else preset.split('-')
  parts = []
  for word in ('demo', 'strong', 'classes'):
    parts.append(words[:1] == [word])
    words = words[parts[-1] :]
  is_demo, _, has_classes = parts
  if len(words) > 1 or not set(words) <= set(names) or (has_classes and not (is_demo and classes)):
    own = ', demo-classes' if classes else ''
    raise ValueError(
      f'{file} has no preset {preset!r}; give paper, demo, strong, demo-strong{own} or MODEL, or demo-MODEL, '
      f'strong-MODEL or demo-strong-MODEL, with one of the models {", ".join(names)}'
    )
  return Preset(*parts, words[0] if words else None)


def demo(config: ml_collections.ConfigDict) -> None:
  """Changes a config to demo size, for two CPU cores: a narrow model on slices of 64 x 64.

  The training is too short for crops to help: a run with crops reached a test Dice of 0.65, the same run without 0.73.
  """
  config.model.width = 8
  config.data.image_size = 64
  config.data.context_mm = 25.0  # the slices of the phantoms are 12 to 23 mm apart
  config.augment.crop_probability = 0.0
  config.augment.crop_fractions = (1 / 2,)  # a smaller crop of 64 x 64 pixels shows nothing
  config.augment.flip = True
  config.train.steps = 1800
  config.train.batch_size = 4
  config.train.learning_rate = 3e-3
  config.train.warmup_steps = 50
  config.train.log_every = 20
  config.train.evaluate_every = 900
  config.evaluate.num_overlays = 6


def strong(config: ml_collections.ConfigDict) -> None:
  """Changes a config to a modern recipe for the same network (docs/recipe.md). The size and the steps stay.

  The parts are those of nnU-Net (Isensee et al., Nature Methods 2021), in moderate strength: patients lie in a scanner
  in nearly one position, and HU are calibrated.
  """
  config.augment.flip = True
  config.augment.hu_shift = 20.0
  config.augment.hu_scale = 0.05
  config.augment.affine_probability = 0.5
  config.augment.shear = 0.1
  config.augment.noise_probability = 0.15
  config.augment.blur_probability = 0.15
  config.augment.low_resolution_probability = 0.15
  config.augment.contrast_probability = 0.15
  config.augment.gamma_probability = 0.3
  config.train.clip_norm = 12.0
