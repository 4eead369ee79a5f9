"""The fields of adapter_config.json that are known, and what is said of others that are set.

A field that is not known may change what is computed: a trainer's own variant of LoRA under PEFT's name.
Those that begin with `use_` are refused, as PEFT names its variants so; others are warned of.
"""

from lorafuse.adapters.reading.directory import CONFIG, AdapterDir, is_mlx
from lorafuse.adapters.reading.modules import Warn
from lorafuse.errors import AdapterError, listed, shown

# Of every type of PEFT 0.21, and those of older versions that it does not have any more.
KNOWN = frozenset(
    """
    ab_svd_init act_fn adapter_layers adapter_len adapters alora_invocation_tokens alpha alpha_pattern
    apply_GS arrow_config asa_importance_beta asa_schedule_exponent asa_target_subspaces
    asa_uncertainty_beta auto_mapping auxiliary_loss_weight base_model_class base_model_name_or_path beta1
    beta2 bias block_share block_size block_size_pattern boft_block_num boft_block_size boft_dropout
    boft_n_butterfly_factor bone_dropout cayley_neumann_eps coft config_A_B config_C config_D_E corda_config
    cpt_mask cpt_token_ids cpt_tokens_type_mask d_initial decompose_both decompose_factor
    decomposition_method deft_dropout delora_lambda deltaT depth effective_rank enable_lora enable_softmax
    enable_softmax_topk encoder_dropout encoder_hidden_size encoder_num_layers
    encoder_reparameterization_type ensure_weight_tying eps eva_config exclude_modules fan_in_fan_out
    feedforward_modules final_warmup frod_dropout generator_seed global_scaling_weight gralora_dropout
    gralora_k group_size hidden_size hira_dropout hybrid_r inference_mode init_bank init_ia3_weights
    init_logits_std init_lora_weights init_r init_scale init_theta_d_bound init_v_bound
    init_vector_bank_bound init_warmup init_weights kasa_config lambda_pattern layer_replication layer_types
    layers_pattern layers_to_transform layerwise_scalings loftq_config lora_alpha lora_bias lora_dropout
    lora_ga_config mask_interval mask_type megatron_config megatron_core merge_weights mini_r miss_dropout
    model_type module_dropout modules_to_save monteclora_config n_frequency n_frequency_pattern n_skills
    n_splits n_tasks num_attention_heads num_B num_cayley_neumann_terms num_frozen_tokens num_layers
    num_ranks num_subspaces num_tasks num_transformer_submodules num_vectors num_virtual_tokens
    oft_block_size opt_loss_decay_factor opt_projection_epsilon opt_projection_format_epsilon
    opt_weighted_loss_type orth_reg_weight para parent_library peft_type peft_version poly_type
    prefix_projection progressbar proj_seed projection_prng_key projection_seed prompt_tuning_init
    prompt_tuning_init_state_dict_path prompt_tuning_init_task prompt_tuning_init_text
    proportional_parameters psoft_alpha psoft_dropout psoft_mag_a psoft_mag_b psoft_orth psoft_svd
    psoft_svd_lowrank_niter pvera_dropout qalora_group_size r randlora_alpha randlora_dropout
    random_loc_seed random_seed rank_dropout rank_dropout_scale rank_pattern regularization_alpha revision
    runtime_config runtime_offload_base_weight sample_at_inference save_indices save_only_topk_weights
    save_precomputed_indices save_projection scaling scaling_pass_value select_top shadow_alpha
    shadow_dropout shadow_hidden_size shadow_intermediate_size shadow_model shadow_num_attention_heads
    shadow_num_hidden_layers share_embeddings softmax_temperature sparse sparse_rate sparsity stride_A
    subspace_rank svd_threshold target_modules target_parameters target_r target_svd_config task_type tfinal
    theta_d_length tinit tinylora_dropout token_dim token_indices tokenizer_kwargs tokenizer_name_or_path
    top_k_lora topk total_step trainable_token_indices transformers_version u unilora_dropout
    update_hidden_size use_asa use_bdlora use_cayley_neumann use_dora use_dynamic_rank use_effective_conv2d
    use_idwt use_original_init use_qalora use_rslora use_trainable_adapters variant vblora_dropout
    vector_length velora_config vera_dropout very_sparse wavelet_family weight_tying xlora_depth
    xlora_dropout_p xlora_size
    """.split()  # noqa: SIM905  # a list would take a line for each
)


def check_fields(adapter: AdapterDir, warn: Warn) -> None:
    """Warns of fields that are set and not known. Raises AdapterError where one looks like a variant."""
    if is_mlx(adapter.config):
        return
    unknown = [field for field, value in adapter.config.items() if value and field not in KNOWN]
    where = adapter.folder / CONFIG
    for field in unknown:
        if field.startswith("use_"):
            raise AdapterError(
                f"{where}: {shown(field)} is set, which PEFT 0.21 does not know; such fields change what an "
                "adapter computes. If this one does not, remove it."
            )
    if unknown:
        warn(f"{where}: fields that are not known are ignored: {listed(unknown)}.")
