"""Every configuration key with its default and meaning; the only module that knows yacs."""

from __future__ import annotations

from mit_semseg.config.node import CN, Config

_C = Config()

# Folder of checkpoints, configuration, logs and pictures of one model.
_C.DIR = "ckpt/ade20k-resnet50dilated-ppm_deepsup"

# --------------------------------------------------------------------------- data
_C.DATASET = CN()
# How the lists below are read: odgt | folder, or a public data set: ade20k | camvid | cityscapes |
# voc2012 | vocaug | coco | coco_panoptic | cocostuff | lip | sbu | sunrgbd.
_C.DATASET.format = "odgt"
# Folder that relative paths in lists (and list paths themselves) may be relative to.
_C.DATASET.root_dataset = "./data/"
# odgt: list files. folder: "images_dir:labels_dir". Public data sets: split names (train, val).
_C.DATASET.list_train = "./data/training.odgt"
_C.DATASET.list_val = "./data/validation.odgt"
_C.DATASET.num_class = 150
# Class table, csv with columns Idx,Name[,R,G,B]; "" takes the data set's own, else ADE20K's for
# 150 classes, else "class 0", "class 1", ...
_C.DATASET.classes = ""
# Stored mask value minus label_offset is the class; 1 as published (0 becomes ignored).
_C.DATASET.label_offset = 1
# Pairs [stored value, class], class -1 for ignored, where no offset describes the masks; a list
# of pairs takes the place of label_offset in the formats odgt and folder.
_C.DATASET.label_map = []
# Stored value, or list of stored values, that are ignored.
_C.DATASET.ignore_label = []
# Short sides in pixels: training draws one per batch (with crop_size one per image), evaluation
# and testing average over all.
_C.DATASET.imgSizes = [300, 375, 450, 525, 600]
# The long side never passes this, in pixels.
_C.DATASET.imgMaxSize = 1000
# Network input sides are multiples of this (the largest stride of the encoder).
_C.DATASET.padding_constant = 8
# Labels are this many times smaller than the image in training.
_C.DATASET.segm_downsampling_rate = 8
# How training makes batches. aspect: as published, whole images, batches as large as their largest.
# crop: random crops of one size (crop_size) of images that are scaled, coloured, blurred, rotated
# and flipped at random, padded with the mean colour and ignored labels.
_C.DATASET.batching = "aspect"
# Horizontal flips in training.
_C.DATASET.random_flip = True
# Random crop (height, width) in training after resizing; [] trains on whole images as published.
# Multiples of padding_constant where batching is crop.
_C.DATASET.crop_size = []
# Strength in [0, 1] of random brightness, contrast and saturation in training; 0 as published.
_C.DATASET.color_jitter = 0.0
# Of batching crop: the least and the greatest factor on the size that imgSizes and imgMaxSize give;
# the greatest angle in degrees, either way; the probability of a Gaussian blur, sigma 0.1 to 2.
_C.DATASET.random_scale = [0.5, 2.0]
_C.DATASET.random_rotation = 10.0
_C.DATASET.random_blur = 0.5
# stop | skip: what training does about a sample that cannot be read; skip takes another one in its
# place and reports it. (Evaluation and prediction leave bad files out and report them.)
_C.DATASET.on_error = "stop"
# What the encoder expects: value = (pixel / 255 * value_range - mean) / std, per channel in
# color_order (RGB or BGR). value_range is 1 or 255.
_C.DATASET.mean = [0.485, 0.456, 0.406]
_C.DATASET.std = [0.229, 0.224, 0.225]
_C.DATASET.color_order = "RGB"
_C.DATASET.value_range = 1.0
# A depth image beside each colour image, as a fourth channel (MODEL.in_channels 4): of sunrgbd, of
# lists with "fpath_depth", and in prediction x_depth.png beside x.jpg, or depth/x.png beside its
# folder.
_C.DATASET.depth = False
# Stored units of depth in a metre (1000: millimetres), or sunrgbd: millimetres with their bits
# rotated by three; auto takes the data set's own, 1000 for lists. Stored 0 is no depth.
_C.DATASET.depth_scale = "auto"
# In metres: channel = (depth - depth_mean) / depth_std, and 0 where there is no depth. These are
# SUN RGB-D's.
_C.DATASET.depth_mean = 2.378
_C.DATASET.depth_std = 1.235

# --------------------------------------------------------------------------- model
_C.MODEL = CN()
_C.MODEL.arch_encoder = "resnet50dilated"
_C.MODEL.arch_decoder = "ppm_deepsup"
# "" = ImageNet weights by name; "none" = random; else a path, a url, "torchvision:NAME" or
# "tfslim:FILE".
_C.MODEL.weights_encoder = ""
# "" or "none" = random; else a path, a url, or "torchvision:NAME".
_C.MODEL.weights_decoder = ""
# Channels of the images: 3, or 4 with DATASET.depth.
_C.MODEL.in_channels = 3
# Channels of the encoder's last feature map.
_C.MODEL.fc_dim = 2048

# --------------------------------------------------------------------------- training
_C.TRAIN = CN()
_C.TRAIN.batch_size_per_gpu = 2
_C.TRAIN.num_epoch = 20
# Epoch whose checkpoint training continues from; 0 starts anew.
_C.TRAIN.start_epoch = 0
# Steps an epoch; "auto" = one pass over the data.
_C.TRAIN.epoch_iters = 5000
# SGD | Adam | AdamW
_C.TRAIN.optim = "SGD"
_C.TRAIN.lr_encoder = 0.02
_C.TRAIN.lr_decoder = 0.02
# Exponent of the poly schedule.
_C.TRAIN.lr_pow = 0.9
# Steps over which the learning rate rises linearly from 0; 0 as published.
_C.TRAIN.warmup_iters = 0
# Momentum of SGD, first beta of Adam and AdamW.
_C.TRAIN.beta1 = 0.9
# Applied to convolution and linear weights only.
_C.TRAIN.weight_decay = 1e-4
# Weight of the auxiliary head's loss.
_C.TRAIN.deep_sup_scale = 0.4
# One for each auxiliary head, in the decoder's order, in place of deep_sup_scale and of the weights
# that the decoder fixes; [] keeps them.
_C.TRAIN.aux_weights = []
# Keep every BatchNorm in evaluation mode: running statistics are used and stay as they are.
_C.TRAIN.fix_bn = False
# nll | smooth | focal | dice | focal_dice | ohem | lovasz, or a sum such as "nll+0.5*dice".
_C.TRAIN.loss = "nll"
# Share of each label that the loss `smooth` spreads over all classes.
_C.TRAIN.label_smoothing = 0.1
# "none"; "sqrt", "median" or "enet": from class frequencies of the training labels (square root of,
# or plain, median-frequency balancing; ENet's 1 / ln(1.02 + share)), counted in a sample of masks
# and kept in DIR; or a list with one weight per class.
_C.TRAIN.class_weights = "none"
# Decay of the exponential moving average of the weights, which is what is validated and saved;
# 0 = off.
_C.TRAIN.ema = 0.0
# Batches whose gradients are added up before one step of the optimizer.
_C.TRAIN.accumulate = 1
# Gradient norm is clipped to this; 0 = off.
_C.TRAIN.clip_grad = 0.0
# fp32 | tf32 | bf16 | fp16 | auto (bf16 where the hardware is fast at it, else tf32).
_C.TRAIN.precision = "fp32"
# Memory format channels last: True | False | auto (on a GPU in bf16 and fp16 for networks without
# depthwise convolutions, on a CPU always).
_C.TRAIN.channels_last = "auto"
# auto | off | pixels: batches are padded to multiples of this, so that a GPU meets few shapes, for
# each of which it has to look for kernels; auto is 64 on a GPU, off on a CPU and with crop_size.
_C.TRAIN.shape_bucket = "auto"
# Keep only what enters the encoder's blocks and compute what they hold again in the backward
# pass: less memory for more time.
_C.TRAIN.recompute = False
# Compile encoder and decoder (torch.compile) for images of any size, which takes minutes. One
# device and process; needs a C++ compiler, on a GPU Triton. Measure whether it pays.
_C.TRAIN.compile = False
# auto | processes | replicas: how one command drives several GPUs. processes: one process for each,
# as torchrun would start them; replicas: one process with a thread for each. auto takes processes
# where torch has NCCL. Without effect on one device, and under torchrun.
_C.TRAIN.parallel = "auto"
# Data loading processes per device.
_C.TRAIN.workers = 16
# Steps between figures in metrics.jsonl.
_C.TRAIN.disp_iter = 20
# Epochs between validations; 0 = never.
_C.TRAIN.eval_epochs = 1
# Epochs' weights kept beside the best; 0 keeps all, as published.
_C.TRAIN.keep = 0
# Minutes between states of the whole run, from which it resumes exactly; 0: only at the end of
# epochs. The newest two are kept.
_C.TRAIN.checkpoint_minutes = 30.0
# Seconds without progress (no batch, no answer of a replica or another rank) before the run stops
# with an error that says what it waited for.
_C.TRAIN.stall_seconds = 300
# stop | skip: what to do at a loss that is no finite number; the batch is saved for replay.
_C.TRAIN.on_nan = "stop"
_C.TRAIN.seed = 304

# --------------------------------------------------------------------------- evaluation
_C.VAL = CN()
_C.VAL.visualize = False
# "epoch_N.pth" or "best.pth" in DIR; with a folder in it, that folder instead of DIR.
_C.VAL.checkpoint = "epoch_20.pth"
_C.VAL.batch_size = 1
# fp32 | tf32 | bf16 | fp16 | auto
_C.VAL.precision = "fp32"
# Compile the network before use: pays for many images of few sizes.
_C.VAL.compile = False
# Add horizontally flipped copies to every scale.
_C.VAL.flip = False
# Count the boundary F-score too: how well the outlines of the classes are met, within 0.75 % of the
# image's diagonal. It takes time.
_C.VAL.boundary = False
# auto | off | side in pixels: images larger than this at network scale are computed in overlapping
# tiles, whose scores are blended; auto does so above 4 million pixels.
_C.VAL.tile = "auto"
# (height, width) of a window that slides over every scale of an image: the network sees nothing of
# another size, as where crops of that size were trained on. [] computes whole images (or tiles).
# Sides are 64 or more, and multiples of the encoder's strides.
_C.VAL.window = []
# Windows begin this share of their size apart, rounded down to multiples of 32 pixels.
_C.VAL.stride = 0.667
# Seconds without a result from any worker process before the evaluation stops with an error; by a
# single process: seconds that a file may take to be read.
_C.VAL.timeout = 600
# Short sides in pixels that are averaged over; [] takes DATASET.imgSizes, as published.
_C.VAL.imgSizes = []

# --------------------------------------------------------------------------- prediction
_C.TEST = CN()
_C.TEST.checkpoint = "epoch_20.pth"
_C.TEST.batch_size = 1
# Folder that results are written to.
_C.TEST.result = "./"
# Any of: color, index, overlay, prob, side (image beside prediction, as published), legend.
_C.TEST.save = ["side", "legend"]
_C.TEST.precision = "fp32"
# Compile the network before use: pays for many images of few sizes.
_C.TEST.compile = False
_C.TEST.flip = False
# Short sides in pixels that are averaged over; [] takes DATASET.imgSizes, as published.
_C.TEST.imgSizes = []
# auto | off | side in pixels: images larger than this at network scale are computed in overlapping
# tiles, whose scores are blended; auto does so above 4 million pixels.
_C.TEST.tile = "auto"
# Seconds that a file may take to be read before the prediction stops with an error.
_C.TEST.timeout = 600
# (height, width) of a window that slides over every scale of an image: the network sees nothing of
# another size, as where crops of that size were trained on. [] computes whole images (or tiles).
# Sides are 64 or more, and multiples of the encoder's strides.
_C.TEST.window = []
# Windows begin this share of their size apart, rounded down to multiples of 32 pixels.
_C.TEST.stride = 0.667
