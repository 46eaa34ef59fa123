"""Every public name of the published toolkit, mit-semseg 1.0.0, where it was and as it is called.

Only what its modules define is listed, not what they import. Further parameters may follow the
published ones, if they have defaults.
"""

import ast
import importlib
import importlib.util
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from mit_semseg.compat import PUBLISHED

ROOT = Path(__file__).resolve().parents[2]

# momentum was 0.001 and corrected for its slow start; here it is torch's.
_NORM = "(num_features, eps=1e-05, momentum=0.1, affine=True)"
_NORMS = f"""
    SynchronizedBatchNorm1d{_NORM}
    SynchronizedBatchNorm2d{_NORM}
    SynchronizedBatchNorm3d{_NORM}
"""
_CALLBACK = """
    DataParallelWithCallback(module, device_ids=None, output_device=None, dim=0)
    DataParallelWithCallback.replicate(self, module, device_ids)
    patch_replication_callback(data_parallel)
"""
_SCATTERED = """
    UserScatteredDataParallel(module, device_ids=None, output_device=None, dim=0)
    user_scattered_collate(batch)
    async_copy_to(obj, dev, main_stream=None)
"""
_MASTER = """
    SyncMaster(master_callback)
    SyncMaster.register_slave(self, identifier)
    SyncMaster.run_master(self, master_msg)
    SyncMaster.nr_slaves
"""
_CONVERT = """
    as_variable(obj)
    as_numpy(obj)
    mark_volatile(obj)
"""
_TENSORS = """
    Dataset()
    TensorDataset(data_tensor, target_tensor)
    ConcatDataset(datasets)
    ConcatDataset.cumsum(sequence)
    ConcatDataset.cummulative_sizes
"""
_LOADER = (
    "DataLoader(dataset, batch_size=1, shuffle=..., sampler=None, batch_sampler=None, "
    "num_workers=0, collate_fn=..., pin_memory=False, drop_last=False, timeout=0, "
    "worker_init_fn=None)"
)
_BUILDER = """
    ModelBuilder.weights_init(m)
    ModelBuilder.build_encoder(arch='resnet50dilated', fc_dim=512, weights='')
    ModelBuilder.build_decoder(arch='ppm_deepsup', fc_dim=512, num_class=150, weights='', \
use_softmax=False)
    SegmentationModule(net_enc, net_dec, crit, deep_sup_scale=None)
    SegmentationModule.forward(self, feed_dict, segSize=None)
    SegmentationModule.pixel_acc(self, pred, label)
"""
_BLOCKS = f"""
    BatchNorm2d{_NORM}
    conv3x3(in_planes, out_planes, stride=1)
    BasicBlock(inplanes, planes, stride=1, downsample=None)
    BasicBlock.expansion
    Bottleneck(inplanes, planes, stride=1, downsample=None)
    Bottleneck.expansion
"""
_LOAD = "load_url(url, model_dir='./pretrained', map_location=None)"
_POOLS = "pool_scales=(1, 2, 3, 6)"
NAMES = {
    "config": "cfg",
    "config.defaults": "_C",
    "dataset": """
        imresize(im, size, interp='bilinear')
        BaseDataset(odgt, opt)
        BaseDataset.parse_input_list(self, odgt, max_sample=-1, start_idx=-1, end_idx=-1)
        BaseDataset.img_transform(self, img)
        BaseDataset.segm_transform(self, segm)
        BaseDataset.round2nearest_multiple(self, x, p)
        TrainDataset(root_dataset, odgt, opt, batch_per_gpu=1)
        ValDataset(root_dataset, odgt, opt)
        TestDataset(odgt, opt)
    """,
    "lib.nn": _NORMS
    + _CALLBACK
    + _SCATTERED
    + "modules \n parallel \n batchnorm \n comm \n replicate",
    "lib.nn.modules": _NORMS + _CALLBACK + "batchnorm \n comm \n replicate",
    "lib.nn.modules.batchnorm": _NORMS + _MASTER,
    "lib.nn.modules.comm": f"""
        FutureResult()
        FutureResult.put(self, result)
        FutureResult.get(self)
        SlavePipe(identifier, queue, result)
        SlavePipe.run_slave(self, msg)
        {_MASTER}
    """,
    "lib.nn.modules.replicate": f"""
        CallbackContext()
        execute_replication_callbacks(modules)
        {_CALLBACK}
    """,
    "lib.nn.modules.unittest": """
        as_numpy
        TorchTestCase(methodName='runTest')
        TorchTestCase.assertTensorClose(self, a, b, atol=0.001, rtol=0.001)
    """,
    "lib.nn.parallel": _SCATTERED + "data_parallel",
    "lib.nn.parallel.data_parallel": f"""
        {_SCATTERED}
        dict_gather(outputs, target_device, dim=0)
        DictGatherDataParallel(module, device_ids=None, output_device=None, dim=0)
        DictGatherDataParallel.gather(self, outputs, output_device)
        _async_copy(inputs, device_ids)
        _async_copy_stream(inputs, device_ids)
    """,
    "lib.utils": _CONVERT + "th",
    "lib.utils.th": _CONVERT,
    "lib.utils.data": _TENSORS + _LOADER + "\n dataset \n sampler \n dataloader",
    "lib.utils.data.dataloader": f"""
        {_LOADER}
        DataLoaderIter(loader)
        ExceptionWrapper(exc_info=...)
        default_collate(batch)
        pin_memory_batch(batch)
    """,
    "lib.utils.data.dataset": f"""
        {_TENSORS}
        Subset(dataset, indices)
        random_split(dataset, lengths)
    """,
    "lib.utils.data.distributed": """
        DistributedSampler(dataset, num_replicas=None, rank=None)
        DistributedSampler.set_epoch(self, epoch)
    """,
    "lib.utils.data.sampler": """
        Sampler(data_source=...)
        SequentialSampler(data_source)
        RandomSampler(data_source)
        SubsetRandomSampler(indices)
        WeightedRandomSampler(weights, num_samples, replacement=True)
        BatchSampler(sampler, batch_size, drop_last)
    """,
    "models": _BUILDER + "models \n resnet \n resnext \n mobilenet \n hrnet \n utils",
    "models.models": f"""
        {_BUILDER}
        SegmentationModuleBase()
        SegmentationModuleBase.pixel_acc(self, pred, label)
        BatchNorm2d{_NORM}
        conv3x3_bn_relu(in_planes, out_planes, stride=1)
        Resnet(orig_resnet)
        ResnetDilated(orig_resnet, dilate_scale=8)
        MobileNetV2Dilated(orig_net, dilate_scale=8)
        C1(num_class=150, fc_dim=2048, use_softmax=False)
        C1DeepSup(num_class=150, fc_dim=2048, use_softmax=False)
        PPM(num_class=150, fc_dim=4096, use_softmax=False, {_POOLS})
        PPMDeepsup(num_class=150, fc_dim=4096, use_softmax=False, {_POOLS})
        UPerNet(num_class=150, fc_dim=4096, use_softmax=False, {_POOLS}, \
fpn_inplanes=(256, 512, 1024, 2048), fpn_dim=256)
        C1.forward(self, conv_out, segSize=None)
        resnet \n resnext \n mobilenet \n hrnet
    """,
    "models.resnet": f"""
        {_BLOCKS}
        {_LOAD}
        model_urls
        ResNet(block, layers, num_classes=1000)
        ResNet.forward(self, x)
        resnet18(pretrained=False)
        resnet50(pretrained=False)
        resnet101(pretrained=False)
    """,
    "models.resnext": f"""
        BatchNorm2d{_NORM}
        conv3x3(in_planes, out_planes, stride=1)
        {_LOAD}
        model_urls
        GroupBottleneck(inplanes, planes, stride=1, groups=1, downsample=None)
        GroupBottleneck.expansion
        ResNeXt(block, layers, groups=32, num_classes=1000)
        ResNeXt.forward(self, x)
        resnext101(pretrained=False)
    """,
    "models.mobilenet": f"""
        BatchNorm2d{_NORM}
        {_LOAD}
        model_urls
        conv_bn(inp, oup, stride)
        conv_1x1_bn(inp, oup)
        InvertedResidual(inp, oup, stride, expand_ratio)
        MobileNetV2(n_class=1000, input_size=224, width_mult=1.0)
        MobileNetV2.forward(self, x)
        mobilenetv2(pretrained=False)
    """,
    "models.hrnet": f"""
        {_BLOCKS}
        {_LOAD}
        model_urls
        blocks_dict
        BN_MOMENTUM
        logger
        HighResolutionModule(num_branches, blocks, num_blocks, num_inchannels, num_channels, \
fuse_method, multi_scale_output=True)
        HighResolutionModule.get_num_inchannels(self)
        HighResolutionModule.forward(self, x)
        HRNetV2(n_class)
        hrnetv2(pretrained=False)
    """,
    "models.utils": _LOAD,
    "utils": """
        setup_logger(distributed_rank=0, filename='log.txt')
        find_recursive(root_dir, ext='.jpg')
        AverageMeter()
        AverageMeter.initialize(self, val, weight)
        AverageMeter.update(self, val, weight=1)
        AverageMeter.add(self, val, weight)
        AverageMeter.value(self)
        AverageMeter.average(self)
        unique(ar, return_index=False, return_inverse=False, return_counts=False)
        colorEncode(labelmap, colors, mode='RGB')
        accuracy(preds, label)
        intersectionAndUnion(imPred, imLab, numClass)
        NotSupportedCliException()
        process_range(xpu, inp)
        REGEX
        parse_devices(input_devices)
    """,
}
LINES = {
    f"mit_semseg.{module}": [line.strip() for line in lines.splitlines() if line.strip()]
    for module, lines in NAMES.items()
}


def wanted(call):
    """The parameters of `name(a, b=1)` -> {"a": ..., "b": 1}; `...` is no default, or any."""
    (function,) = ast.parse(f"def f{call[call.index('(') :]}: pass").body
    assert isinstance(function, ast.FunctionDef)
    names = [argument.arg for argument in function.args.args]
    defaults = [ast.literal_eval(value) for value in function.args.defaults]
    return dict(zip(names, [...] * (len(names) - len(defaults)) + defaults))


@pytest.mark.parametrize(("module", "line"), [(m, line) for m in LINES for line in LINES[m]])
def test_published_names_and_signatures(module, line):
    value = importlib.import_module(module)
    for part in line.partition("(")[0].split("."):
        value = getattr(value, part)
    if "(" not in line or line == "NotSupportedCliException()":
        return
    expected = wanted(line)
    parameters = list(inspect.signature(value).parameters.values())
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][: len(expected)]
    assert [p.name for p in positional] == list(expected)  # in this order
    for parameter in positional:
        assert expected[parameter.name] in (..., parameter.default), parameter
    further = [p for p in parameters if p not in positional and p.default is p.empty]
    asked = [p for p in further if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    assert not asked, "a published call would now miss an argument"


def test_every_published_module_is_listed():
    listed = {f"mit_semseg.{module}" for module in NAMES}
    assert set(PUBLISHED) - listed == {"mit_semseg.lib.nn.comm"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_module_is_the_same_under_its_published_name(name):
    module, home = importlib.import_module(name), importlib.import_module(PUBLISHED[name])
    assert module is home
    assert module.__name__ == PUBLISHED[name]
    assert module.__spec__ is not None
    assert module.__spec__.name == PUBLISHED[name]
    assert importlib.util.find_spec(name) is not None
    for value in vars(module).values():
        if inspect.isclass(value) and value.__module__ == module.__name__:
            assert pickle.loads(pickle.dumps(value)) is value


WAYS = [
    "import mit_semseg.models.resnet as r; r.resnet18",
    "from mit_semseg.models import resnet; resnet.resnet18",
    "from mit_semseg.models.models import UPerNet",
    "import mit_semseg.models; mit_semseg.models.models.UPerNet",
    "import mit_semseg.lib.nn; mit_semseg.lib.nn.modules.batchnorm.SynchronizedBatchNorm2d",
    "import mit_semseg.lib.nn.parallel.data_parallel as d; d.dict_gather",
    "from mit_semseg.lib.nn.modules import replicate; replicate.CallbackContext()",
    "from mit_semseg.lib.utils.data.sampler import RandomSampler",
    "import mit_semseg.lib.utils.data; mit_semseg.lib.utils.data.dataset.Subset",
    "import mit_semseg.lib.utils; mit_semseg.lib.utils.th.as_numpy",
    "import mit_semseg.compat.resnet as c, mit_semseg.models.resnet as r; assert c is r",
]
# A child each: what an import finds depends on what has been imported of the package before it.
IN_CHILDREN = """
import os, sys, torch, traceback
failed = []
for code in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            exec(code)
        except BaseException:
            print(code, file=sys.stderr)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    failed += [code] if os.waitpid(child, 0)[1] else []
assert not failed, failed
assert not any(name.startswith("mit_semseg") for name in sys.modules)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the interpreter is forked")
def test_ways_to_import():
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", IN_CHILDREN, *WAYS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_unknown_names_are_not_modules():
    for name in ("mit_semseg.models.vgg", "mit_semseg.lib.nn.modules.nothing"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)
    for name in ("mit_semseg.models", "mit_semseg.lib.nn", "mit_semseg.lib.utils"):
        with pytest.raises(AttributeError, match=r"no attribute 'nothing'"):
            importlib.import_module(name).nothing  # noqa: B018
