"""Every internal name of DeepSpeed that megalite uses: where it is defined, the signature that is relied on, and why.

None of these is a public API. `tests/unit/engine/test_seams.py` looks each up in the installed source, and finds names
that engine/ and ranks/accelerator.py use and that are missing here, so a release that changes one fails a test that
names it. Documented names (`init_distributed`, `get_accelerator`, an engine's `step`) are here only if megalite
overrides them. No other room imports DeepSpeed's internal modules.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Seam:
    """One name.

    file: in the package `deepspeed`. name: a class, a function, `Class.method`, or `Class.attribute` that the class
    sets on itself; `*.attribute` is set in that file on any object (a parameter). form: names of the parameters, in
    order; `…` at the end if more may follow; empty for classes and attributes. used: files of megalite that use it.
    """

    file: str
    name: str
    form: str
    used: str
    why: str


_ENGINE = "runtime/engine.py"
_ZERO = "runtime/zero/stage_1_and_2.py"
_ZERO3 = "runtime/zero/stage3.py"
_PARTITION = "runtime/zero/partition_parameters.py"
_COORDINATOR = "runtime/zero/partitioned_param_coordinator.py"
_SCALER = "runtime/fp16/loss_scaler.py"
_FRAGMENT = "utils/tensor_fragment.py"
_SWAPPED = "runtime/swap_tensor/optimizer_utils.py"
_ACCELERATOR = "accelerator/cpu_accelerator.py"
_CUDA = "accelerator/cuda_accelerator.py"
_S12, _S3 = "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"


def _engine(name: str, form: str, why: str, used: str = "engine.py") -> Seam:
    return Seam(_ENGINE, f"DeepSpeedEngine.{name}", form, used, why)


def _zero(name: str, form: str, why: str) -> Seam:
    return Seam(_ZERO, f"{_S12}.{name}", form, "zero.py", why)


def _zero3(name: str, form: str, why: str) -> Seam:
    return Seam(_ZERO3, f"{_S3}.{name}", form, "zero3.py", why)


_OF_THE_ENGINE = (
    Seam(_ENGINE, "DeepSpeedEngine", "", "engine.py", "base class of Engine"),
    _engine(
        "__init__",
        "self, args, model, optimizer, model_parameters, training_data, lr_scheduler, mpu, …",
        "called with args, model, mpu, model_parameters, config and config_class",
    ),
    Seam("runtime/config.py", "DeepSpeedConfig", "", "build.py", "read before the engine is made"),
    Seam(
        "runtime/config.py",
        "DeepSpeedConfig.__init__",
        "self, config, mpu, …",
        "build.py",
        "mpu: batch sizes are over its data axis",
    ),
    _engine("_config", "", "the config as DeepSpeed parsed it", "build.py"),
    _engine("get_data_types", "self", "read back: compute and accumulation types", "build.py"),
    _engine("train_batch_size", "self", "read back", "build.py"),
    _engine("train_micro_batch_size_per_gpu", "self", "read back", "build.py"),
    _engine("gradient_accumulation_steps", "self", "read back", "build.py"),
    _engine("zero_optimization", "self", "whether the optimizer is ZeRO's"),
    _engine("zero_optimization_stage", "self", "read back; which optimizer to adopt"),
    _engine("fp16_enabled", "self", "whether the loss scale can cause an overflow"),
    _engine("_take_model_step", "self, lr_kwargs", "overridden: the rate follows the step"),
    _engine(
        "_do_optimizer_sanity_check",
        "self, basic_optimizer",
        "overridden: bf16 with ZeRO-1 does not go to BF16_Optimizer; Muon is not imported",
    ),
    _engine("_configure_distributed_model", "self, model", "overridden: experts use our groups"),
    _engine("has_moe_layers", "", "DeepSpeed's path for experts"),
    *(
        Seam("utils/groups.py", f"*.{name}", "", "engine.py", "groups of experts, by name")
        for name in (
            "_EXPERT_PARALLEL_GROUP",
            "_EXPERT_PARALLEL_GROUP_RANKS",
            "_EXPERT_DATA_PARALLEL_GROUP",
            "_EXPERT_DATA_PARALLEL_GROUP_RANKS",
        )
    ),
    _engine("_broadcast_model", "self", "overridden: ranks have equal weights already"),
    _engine(
        "_reduce_non_expert_gradients",
        "self, grads, elements_per_buffer",
        "overridden: ZeRO-0 on one rank copies no gradients",
    ),
    _engine("clip_fp32_gradients", "self", "overridden: ZeRO-0 clips by the global norm"),
    _engine("gradient_clipping", "self", "overridden: ZeRO-0 asks for the norm always"),
    _engine(
        "backward", "self, loss, retain_graph, scale_wrt_gas", "overridden: measures gradients"
    ),
    _engine("step", "self, lr_kwargs", "the update; called once a step", "pipeline/actions.py"),
    _engine(
        "set_gradient_accumulation_boundary",
        "self, is_boundary",
        "which backward is a step's last",
        "pipeline/actions.py",
    ),
    _engine("optimizer", "", "DeepSpeed's, which becomes ours by `adopt`"),
    _engine("basic_optimizer", "", "the optimizer that ZeRO wraps"),
    _engine("lr_scheduler", "", "DeepSpeed's schedule of the rate", "engine.py build.py"),
    _engine("module", "", "the stage"),
    _engine("device", "", "of this rank"),
    _engine("_global_grad_norm", "", "set by ZeRO-0's clipping, returned by get_global_grad_norm"),
    Seam(
        "runtime/lr_schedules.py",
        "*.last_batch_iteration",
        "",
        "build.py",
        "the step of DeepSpeed's schedules",
    ),
    Seam(_SCALER, "DynamicLossScaler", "", "engine.py", "tells a dynamic scale from a fixed one"),
    Seam(
        _SCALER,
        "DynamicLossScaler.update_scale",
        "self, overflow",
        "zero.py",
        "called once a step, after the update",
    ),
    *(
        Seam(_SCALER, f"DynamicLossScaler.{name}", "", "engine.py zero.py", why)
        for name, why in {
            "cur_scale": "saved: the scale itself",
            "cur_iter": "saved: steps so far",
            "last_overflow_iter": "saved: when the scale fell",
            "cur_hysteresis": "saved: overflows that are still tolerated",
            "min_scale": "whether the scale can be lowered after an overflow",
            "raise_error_at_min_scale": "off: megalite decides what happens there",
        }.items()
    ),
)

_OF_ZERO_1_AND_2 = (
    Seam(_ZERO, _S12, "", "zero.py engine.py", "base class of ShardedOptimizer"),
    _zero("check_overflow", "self, partition_gradients", "overridden: the norm decides"),
    _zero("_update_scale", "self, has_overflow", "overridden: the scale moves after the step"),
    _zero("step", "self, closure", "overridden: loss scale, one verdict"),
    _zero("scaled_global_norm", "self, norm_type", "overridden: the global norm"),
    _zero("unscale_and_clip_grads", "self, grad_groups_flat, total_norm", "overridden: no wait"),
    _zero("update_lp_params", "self", "called: masters to weights"),
    _zero(
        "_fill_param_grad_accum_attribute", "self, param", "overridden: one kernel, no fp32 copy"
    ),
    _zero("gradient_accumulation_dtype", "", "dtype of those sums"),
    _zero("reduce_gradients", "self, pipeline_parallel", "overridden: no parameter is skipped"),
    _zero("independent_gradient_partition_epilogue", "self", "overridden: the host does not wait"),
    _zero(
        "reduce_ready_partitions_and_remove_grads",
        "self, param, i",
        "puts a gradient into a bucket",
    ),
    _zero(
        "reduce_independent_p_g_buckets_and_remove_grads",
        "self, param, i",
        "overridden: unevenly cut tensors have buckets of their own",
    ),
    _zero("get_param_comm_dtype", "self, param", "key of `ipg_buckets`"),
    _zero("contiguous_gradients", "", "whether a bucket has two buffers in turn"),
    _zero("reduce_ipg_grads", "self, comm_dtype", "reduces what is in the buckets"),
    _zero("_clear_previous_reduced_grads", "self", "frees gradients that others own"),
    _zero("get_gradient_for_reduction", "self, param", "a gradient, or its fp32 sum"),
    _zero("get_param_id", "self, param", "key of `params_already_reduced`"),
    _zero("params_already_reduced", "", "parameters reduced in this step"),
    _zero("ipg_buckets", "", "gradients that wait for their reduction"),
    _zero("overlap_comm", "", "whether reductions have a stream of their own"),
    _zero("reduction_stream", "", "that stream"),
    _zero("update_offload_overflow_tracker", "self, grad", "overridden: no wait for each gradient"),
    _zero("set_norm_for_param_grad_in_gpu", "self, param", "overridden: no norm for each"),
    _zero("async_accumulate_grad_in_cpu_via_gpu", "self, param", "overridden: no wait for each"),
    _zero("_pending_offload_events", "", "events after copies to main memory, by stream"),
    _zero("_record_offload_copy", "self", "records them"),
    _zero("_record_gradient_stream", "self, tensor, stream", "tells the allocator of a stream"),
    _zero("reset_cpu_buffers", "self", "overridden: a refused step leaves no gradient sums"),
    _zero("is_gradient_accumulation_boundary", "self", "whether a backward is a step's last"),
    _zero("grad_position", "", "place of a gradient in this rank's part of its group"),
    _zero("real_dp_process_group", "", "the ranks over which a group is sharded"),
    _zero(
        "_get_compact_grad_partition_slice",
        "self, group_idx, partition_id, param_id, num_elements",
        "this rank's part of the fp32 sum of a 16-bit gradient",
    ),
    _zero("clear_grad_attribute", "self, param", "overridden: a large gradient is still read"),
    _zero("copy_grads_in_partition", "self, param, group_idx", "overridden: each copy is apart"),
    _zero("_get_param_group_idx", "self, param", "the optimizer's group of a parameter"),
    _zero("_use_compact_grad_partition_buffer", "self, group_idx", "whether copies are made"),
    _zero("get_param_gradient_attribute", "self, param", "the gradient that is cleared"),
    _zero(
        "allreduce_and_copy",
        "self, small_bucket, communication_data_type, rank, log, divide, process_group, output_bucket",
        "overridden: the host does not wait",
    ),
    _zero(
        "_allreduce_noncontiguous_bucket_preserving_fp32",
        "self, grads, grad_params, communication_data_type",
        "overridden: the host does not wait",
    ),
    _zero("bit16_groups", "", "parameters by the optimizer's groups"),
    _zero("single_partition_of_fp32_groups", "", "flat fp32 masters of this rank"),
    _zero("params_in_partition", "", "parameters that overlap this rank's part"),
    _zero("averaged_gradients", "", "this rank's gradients by group, after the reduction"),
    _zero("cpu_offload", "", "gradients and masters are in main memory"),
    _zero("accumulated_grads_in_cpu", "", "gradient sums with offload"),
    _zero("micro_step_id", "", "set, so that no backward counts as a step's first"),
    _zero("clip_grad", "", "the limit of the norm"),
    _zero("loss_scale", "", "current loss scale"),
    _zero("loss_scaler", "", "the scaler"),
    _zero("overflow", "", "whether the update was left out"),
    _zero("optimizer", "", "the one that is wrapped, with the moments"),
    _zero("device", "", "where its partitions are"),
    Seam(_ZERO, "*._zero_padding", "", "zero.py", "marks gradients that are padding"),
    Seam(
        _ZERO,
        "*.grad_accum",
        "",
        "engine.py zero.py",
        "fp32 sum of a 16-bit gradient, on a parameter",
    ),
    Seam(_FRAGMENT, "tensor_fragment.lp_fragment_address", "", "zero.py", "part of the parameter"),
    Seam(_FRAGMENT, "tensor_fragment.hp_fragment_address", "", "zero.py", "part of the partition"),
    Seam(_FRAGMENT, "fragment_address.start", "", "zero.py", "first element of a part"),
    Seam(_FRAGMENT, "fragment_address.numel", "", "zero.py", "length of a part"),
    Seam(_ZERO, "*._hp_mapping", "", "zero.py", "a parameter's fragment"),
)

_OF_ZERO_3 = (
    Seam(_ZERO3, _S3, "", "zero3.py engine.py", "base class of FullyShardedOptimizer"),
    _zero3("check_overflow", "self, partition_gradients", "overridden: the norm decides"),
    _zero3("_update_scale", "self, has_overflow", "overridden: the scale moves after the step"),
    _zero3("step", "self, closure", "overridden: loss scale, one verdict"),
    _zero3("_get_norm_groups", "self", "overridden: the global norm"),
    _zero3(
        "unscale_and_clip_grads", "self, sub_group_id, total_norm", "overridden: only if needed"
    ),
    _zero3("clip_grad", "", "the limit of the norm"),
    _zero3("loss_scale", "", "current loss scale"),
    _zero3("_post_step", "self, timer_names", "overridden: the host does not wait"),
    _zero3("_prepare_sub_group", "self, sub_group_id, timer_names", "overridden: gradients"),
    _zero3(
        "_offload_grad_partition_at_boundary",
        "self, param, grad_buffer, offload_fp32_gradients, offload_fp32_offsets",
        "overridden: gradients are in main memory already",
    ),
    _zero3("_swappable_optimizer_subgroup", "self, sub_group_id", "whether states are in files"),
    _zero3("_get_param_partition_rank", "self, param", "this rank's place among the shards"),
    _zero3("_partition_all_parameters", "self", "called before weights are set"),
    _zero3("_unflatten_partitioned_parameters", "self, sub_group_id", "called after"),
    _zero3("get_param_id", "self, param", "key of `grad_position`"),
    _zero3("parameter_offload", "", "holds the coordinator"),
    _zero3("fp16_groups", "", "parameters by sub-group"),
    _zero3("fp16_partitioned_groups_flat", "", "weights' shards by sub-group"),
    _zero3("fp16_partitioned_groups_flat_numel", "", "their sizes"),
    _zero3("fp32_partitioned_groups_flat", "", "masters by sub-group"),
    _zero3("grad_partitions_flat_buffer", "", "the buffer of gradient sums"),
    _zero3("grad_position", "", "a parameter's sub-group, first element and length there"),
    _zero3("persistent_parameters", "", "small parameters that stay whole"),
    _zero3("swap_optimizer", "", "masters and moments in files"),
    _zero3("offload_optimizer", "", "masters and moments in main memory or files"),
    _zero3("offload_param", "", "weights' shards in main memory, page-locked"),
    _zero3("optimizer_swapper", "", "reads and writes those files"),
    _zero3("reduce_and_partition_stream", "", "of reductions; the host would wait for it"),
    _zero3("loss_scaler", "", "the scaler"),
    _zero3("overflow", "", "whether the update was left out"),
    _zero3("optimizer", "", "the one that is wrapped, with the moments"),
    _zero3("device", "", "where gradients are summed"),
    Seam(
        "runtime/zero/parameter_offload.py",
        "DeepSpeedZeRoOffload.get_param_coordinator",
        "self",
        "zero3.py",
        "the coordinator that gathers weights",
    ),
    Seam(
        _COORDINATOR,
        "PartitionedParameterCoordinator",
        "",
        "zero3.py",
        "base class of the timed one",
    ),
    Seam(
        _COORDINATOR,
        "PartitionedParameterCoordinator.fetch_sub_module",
        "self, current_submodule, forward",
        "zero3.py",
        "overridden: counts as waiting time",
    ),
    Seam(
        _COORDINATOR,
        "PartitionedParameterCoordinator.__allgather_stream",
        "",
        "zero3.py",
        "of gathers, which must follow the update",
    ),
    Seam(_PARTITION, "Init", "", "initial.py", "makes parameters ZeRO-3's"),
    Seam(
        _PARTITION,
        "Init.__init__",
        "self, module, data_parallel_group, mem_efficient_linear, remote_device, pin_memory, config_dict_or_path, …",
        "initial.py",
        "called with module, data_parallel_group, config_dict_or_path, dtype and mpu",
    ),
    Seam(
        _PARTITION,
        "Init._convert_to_deepspeed_param",
        "self, param",
        "initial.py",
        "makes one parameter ZeRO-3's, still whole",
    ),
    Seam(_PARTITION, "*.partition", "", "initial.py", "method of a parameter: keeps its shard"),
    Seam(_PARTITION, "*.ds_tensor", "", "engine.py initial.py", "a parameter's shard"),
    Seam(_PARTITION, "*.ds_numel", "", "zero3.py", "a parameter's elements, without padding"),
    Seam(_ZERO3, "*.ds_id", "", "zero3.py", "names a sub-group's files"),
    Seam(_PARTITION, "*.all_gather", "", "zero3.py", "gathers parameters that stay whole"),
    Seam(
        "runtime/swap_tensor/optimizer_utils.py",
        "OptimizerSwapper.swap_params_info",
        "",
        "zero3.py",
        "a sub-group's files",
    ),
    Seam(
        "runtime/swap_tensor/optimizer_utils.py",
        "OptimizerSwapper.swap_buffer_manager",
        "",
        "zero3.py",
        "the buffers",
    ),
    Seam(
        "runtime/swap_tensor/utils.py",
        "SwapBufferManager.all_buffers",
        "",
        "zero3.py",
        "the buffers that files are read into",
    ),
    Seam(_SWAPPED, "OptimizerStateSwapInfo.tensors", "", "zero3.py", "master and moments"),
    Seam(
        _SWAPPED,
        "OptimizerStateSwapInfo.add_state_tensors",
        "self, tensor_list",
        "zero3.py",
        "names files of new moments",
    ),
    Seam(_SWAPPED, "SwapTensorContext.swap_path", "", "zero3.py", "the file of one tensor"),
    Seam(
        "runtime/swap_tensor/aio_config.py",
        "get_aio_config",
        "param_dict",
        "nvme.py",
        "how files are read",
    ),
)

_OF_THE_MACHINE = (
    Seam(_ACCELERATOR, "CPU_Accelerator", "", "ranks/accelerator.py", "base class of ours"),
    Seam(
        _ACCELERATOR,
        "CPU_Accelerator.is_fp16_supported",
        "self",
        "ranks/accelerator.py",
        "overridden: torch computes fp16 on any CPU",
    ),
    Seam(
        _ACCELERATOR,
        "CPU_Accelerator.create_op_builder",
        "self, op_name",
        "ranks/accelerator.py",
        "overridden: no shared-memory op",
    ),
    Seam(_CUDA, "CUDA_Accelerator", "", "ranks/accelerator.py", "base class of ours"),
    Seam(
        _CUDA,
        "CUDA_Accelerator.available_memory",
        "self, device_index",
        "ranks/accelerator.py",
        "overridden: GPUs may be named by UUID",
    ),
    Seam("comm/comm.py", "*.cdb", "", "collective_spans.py", "DeepSpeed's communication backend"),
    Seam(
        "runtime/zero/utils.py",
        "assert_ints_same_as_other_ranks",
        "ints",
        "over_fakes.py",
        "left out in a dry run: no other rank answers",
    ),
    Seam(
        "comm/torch.py",
        "TorchBackend.all_gather_function",
        "",
        "collective_spans.py",
        "wrapped in a step that is measured",
    ),
    Seam(
        "comm/torch.py",
        "TorchBackend.reduce_scatter_function",
        "",
        "collective_spans.py",
        "wrapped in a step that is measured",
    ),
    Seam("git_version_info.py", "*.installed_ops", "", "nvme.py", "which ops are prebuilt"),
    Seam(
        "ops/op_builder/async_io.py",
        "AsyncIOBuilder",
        "",
        "nvme.py",
        "builds the op that reads and writes states",
    ),
)

SEAMS: tuple[Seam, ...] = (
    *_OF_THE_ENGINE,
    *_OF_ZERO_1_AND_2,
    *_OF_ZERO_3,
    *_OF_THE_MACHINE,
)
