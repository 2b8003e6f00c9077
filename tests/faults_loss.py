"""Mistakes in the kernels and in the reduction over processes, each with a test that must notice."""

from faults import Fault

VALUES = "tests/test_loss_values.py::"
PROPERTIES = "tests/test_loss_properties.py::"
OBJECTIVE = "tests/test_loss_objective.py::"

LOSS = (
    Fault(
        "sign of a gradient",
        "kernels/gradient.py",
        (
            (
                "    return entry, -entry\n",
                "    return entry, entry\n",
            ),
        ),
        VALUES + "test_options[triton-2-entropy-similarity-logits]",
    ),
    Fault(
        "swapped teacher: the student's own probabilities in the weight",
        "kernels/weighting.py",
        (("p = _teachers_probabilities(teacher,", "p = _teachers_probabilities(student,"),),
        VALUES + "test_options[triton-4-entropy-similarity-logits]",
    ),
    Fault(
        "swapped label: the student's own class as pseudo-label",
        "kernels/weighting.py",
        (("ce, entry = _lesson(student, teacher.label,", "ce, entry = _lesson(student, student.label,"),),
        VALUES + "test_options[triton-4-entropy-similarity-logits]",
    ),
    Fault(
        "tail dropped where one voxel is left over",
        "kernels/statistics.py",
        (("if (program == programs - 1) & (i.voxels % BLOCK != 0):", "if (program == programs - 1) & (i.voxels % BLOCK > 1):"),),
        VALUES + "test_voxel_counts_around_a_block[triton-513]",
    ),
    Fault(
        "tail mask missing: voxels beyond the end are counted",
        "kernels/statistics.py",
        (("        m_ab = m_ab & keep\n", ""),),
        VALUES + "test_options[triton-2-None-similarity-logits]",
    ),
    Fault(
        "tail mask missing: reads beyond the end of the last channel",
        "kernels/gradient.py",
        (
            (
                "    valid = v < i.voxels\n",
                "    valid = v < i.voxels + 1\n",
            ),
        ),
        "tests/test_loss_memory.py::test_nothing_outside_the_tensors_is_touched[triton-float32-5-7-67-channels_last-end]",
    ),
    Fault(
        "missing cast: squares of half-precision features are not computed in float32",
        "kernels/similarity.py",
        (("x = widened(tl.load(pointers, mask=mask, other=0.0))", "x = tl.load(pointers, mask=mask, other=0.0)"),),
        VALUES + "test_classes_and_features_in_half_precision[triton-dtype0-2-16]",
    ),
    Fault(
        "rounded to half precision before the upstream factor",
        "kernels/gradient.py",
        (
            (
                "        grad_a = _two_classes(entry_a, i.factor)\n",
                "        entry_a = (entry_a * (i.factor / 65536)).to(i.out_a.dtype.element_ty).to(tl.float32) * 65536\n"
                "        grad_a = _two_classes(entry_a, 1.0)\n",
            ),
        ),
        VALUES + "test_half_precision_gradient_elementwise[triton-dtype0-2-8.0-65536.0]",
    ),
    Fault(
        "upstream factor ignored",
        "kernels/gradient.py",
        (("tl.load(upstream).to(tl.float32) + tl.load(sums)", "1.0 + tl.load(sums)"),),
        PROPERTIES + "test_upstream_factor_is_linear[triton]",
    ),
    Fault(
        "stale prototype: the first sample's for all samples",
        "kernels/weighting.py",
        (("        prototypes_b += sample.to(tl.int64) * (CLASSES * FEATURES_B)\n", ""),),
        VALUES + "test_options[triton-2-entropy-similarity-logits]",
    ),
    Fault(
        "stale sum: the last partial result of a sample is left out",
        "kernels/prototypes.py",
        (("        inside = p < programs\n", "        inside = p < tl.maximum(programs - 1, 1)\n"),),
        VALUES + "test_several_programs_per_sample_and_several_samples[triton]",
    ),
    Fault(
        "wrong normaliser: the other student's count",
        "kernels/total.py",
        (("loss_ba / normaliser(counts, 1, RULES)", "loss_ba / normaliser(counts, 0, RULES)"),),
        VALUES + "test_options[triton-2-entropy-similarity-logits]",
    ),
    Fault(
        "wrong normaliser in the gradient alone",
        "kernels/weighting.py",
        (
            (
                "scale_ba = cw / normaliser(counts, 1, RULES)",
                "scale_ba = cw / normaliser(counts, 0, RULES)",
            ),
        ),
        VALUES + "test_options[triton-2-entropy-similarity-logits]",
    ),
    Fault(
        "eps missing in the normaliser",
        "kernels/total.py",
        (("tl.load(counts + student).to(tl.float32) + RULES.eps", "tl.load(counts + student).to(tl.float32)"),),
        VALUES + "test_no_reliable_voxel_is_zero_and_connected_to_the_graph[triton]",
    ),
    Fault(
        "eps missing in the entropy",
        "kernels/voxels.py",
        (("entropy -= p * log(p + RULES.eps)", "entropy -= p * log(p + 1e-30)"),),
        VALUES + "test_eps_reaches_entropy_prototype_and_normaliser[triton-entropy-0.5]",
    ),
    Fault(
        "eps missing in the entropy without a logarithm per class",
        "kernels/voxels.py",
        (("of.inverse * total - RULES.eps * shared", "of.inverse * total"),),
        "tests/test_kernels_entropy.py::test_entropy_up_to_a_constant[4-1e-06]",
    ),
    Fault(
        "a logit of -inf makes the entropy NaN",
        "kernels/voxels.py",
        (("e * tl.maximum(of.below[c], -1e4)", "e * of.below[c]"),),
        "tests/test_kernels_entropy.py::test_a_logit_of_minus_infinity[4]",
    ),
    Fault(
        "mask not strict: equally confident networks teach",
        "kernels/voxels.py",
        (("(same & (error_a < error_b))", "(same & (error_a <= error_b))"),),
        PROPERTIES + "test_identical_networks[triton]",
    ),
    Fault(
        "class label off by one where two logits are equal: the last maximum",
        "kernels/voxels.py",
        (
            (
                "better = (z[c] <= top) == 0",
                "better = (z[c] < top) == 0",
            ),
        ),
        VALUES + "test_equal_logits_take_the_first_maximum[triton]",
    ),
    Fault(
        "wrong stride: two spatial axes exchanged",
        "kernels/voxels.py",
        (
            (
                "(row // size1) * strides.axis0 + (row % size1) * strides.axis1",
                "(row // size1) * strides.axis1 + (row % size1) * strides.axis0",
            ),
        ),
        VALUES + "test_memory_layouts[triton-spatial_slice]",
    ),
    Fault(
        "int32 offsets where the tensor is too large for them",
        "kernels/voxels.py",
        (("return tl.cast(channel, tl.int64) * stride", "return channel * stride"),),
        VALUES + "test_offsets_beyond_int32[triton-channels]",
    ),
    Fault(
        "features of the last, partly filled block read without a mask",
        "kernels/statistics.py",
        (("    inside = (f < FEATURES)[:, None, None]\n", "    inside = (f < FEATURES + 1)[:, None, None]\n"),),
        "tests/test_loss_memory.py::test_nothing_outside_the_tensors_is_touched[triton-float32-2-5-517-contiguous-end]",
    ),
    Fault(
        "a NaN in a logit is swallowed",
        "kernels/statistics.py",
        (("bad = tl.maximum(a.top, b.top,", "bad = tl.maximum(a.top, a.top,"),),
        VALUES + "test_bad_logits_never_give_a_finite_loss[triton-1-nan-entropy-similarity-logits]",
    ),
    Fault(
        "what the first pass found of NaN is not added to the loss",
        "kernels/total.py",
        (("mutual = mutual_ab + mutual_ba + nonfinite", "mutual = mutual_ab + mutual_ba"),),
        VALUES + "test_bad_logits_never_give_a_finite_loss[triton-1-nan-entropy-similarity-logits]",
    ),
    Fault(
        "an unwritten output: zeros are not stored where nobody teaches",
        "kernels/weighting.py",
        (("        tl.store(out.weights + v, w_ab, mask=valid)", "        tl.store(out.weights + v, w_ab, mask=valid & m_ab)"),),
        VALUES + "test_options[triton-2-entropy-similarity-logits]",
    ),
    Fault(
        "host synchronisation in an operator's body",
        "kernels/passes.py",
        (
            (
                "    grads = new_gradient(za, rules.learns_a), ",
                "    assert sums[0].item() == 0\n    grads = new_gradient(za, rules.learns_a), ",
            ),
        ),
        "tests/test_loss_compile.py::test_operator_bodies_never_look_at_values",
    ),
    Fault(
        "an input is written to",
        "kernels/passes.py",
        (("    values, code = record_shapes(", "    za.copy_(za + 0)\n    values, code = record_shapes("),),
        VALUES + "test_options[triton-2-entropy-similarity-logits]",
    ),
    Fault(
        "backward pass of many classes: the networks' logits exchanged",
        "kernels/gradient.py",
        (("z = z + (tl.where(is_b, zb[c], za[c]),)", "z = z + (tl.where(is_b, za[c], zb[c]),)"),),
        VALUES + "test_options[triton-4-entropy-similarity-logits]",
    ),
    Fault(
        "masked voxels are counted among the members of a prototype",
        "rplib/lean.py",
        (("    return of_class if inside is None else of_class & inside\n", "    return of_class\n"),),
        "tests/test_loss_averages.py::test_values_and_gradients_over_three_calls[torch-2-True]",
    ),
    Fault(
        "masked voxels' features are summed into the prototypes",
        "rplib/lean.py",
        (
            ("    return of_class if inside is None else of_class & inside\n", "    return of_class\n"),
            ("values = valid_only(f[b, :, v].to(dtype), inside)", "values = f[b, :, v].to(dtype)"),
        ),
        "tests/test_loss_mask.py::test_loss_gradient_and_maps_are_those_of_the_cropped_problem[torch-2-2-default]",
    ),
    Fault(
        "Dice: the other network's sums",
        "kernels/dice.py",
        (("overlap = tl.load(at + network * CLASSES", "overlap = tl.load(at + (1 - network) * CLASSES"),),
        OBJECTIVE + "test_values_and_gradients[triton-2-None]",
    ),
    Fault(
        "Dice: unlabelled samples count",
        "kernels/statistics.py",
        (("_rows(tl.where(known, tiles[c], 0.0))", "_rows(tiles[c])"),),
        OBJECTIVE + "test_values_and_gradients[triton-4-None]",
    ),
    Fault(
        "Dice: its gradient left out of the second network",
        "kernels/weighting.py",
        (("entry_b += tl.where(known, supervised_slope(", "entry_b += 0 * tl.where(known, supervised_slope("),),
        OBJECTIVE + "test_values_and_gradients[triton-2-None]",
    ),
    Fault(
        "Dice: a class too many in the mean",
        "kernels/dice.py",
        (("    share = factor / RULES.chosen\n", "    share = factor / (RULES.chosen + 1)\n"),),
        OBJECTIVE + "test_values_and_gradients[triton-4-dice_classes2]",
    ),
    Fault(
        "process group: counts of this rank alone",
        "kernels/operators.py",
        (("counts, sums = ranks.detached_sum(counts, options.process_group), ", "counts, sums = counts, "),),
        "tests/test_loss_ranks.py::test_two_ranks_are_one_process[triton-2-default-both]",
    ),
    Fault(
        "process group: gradients not multiplied by the number of ranks",
        "rplib/ranks.py",
        (("return upstream * ctx.ranks, None, None", "return upstream, None, None"),),
        "tests/test_loss_ranks.py::test_two_ranks_are_one_process[torch-2-default-both]",
    ),
    Fault(
        "mask: voxels outside still teach",
        "rplib/lean_voxels.py",
        (("    return mask if valid is None else mask & valid\n", "    return mask\n"),),
        "tests/test_loss_mask.py::test_loss_gradient_and_maps_are_those_of_the_cropped_problem[torch-2-2-None0]",
    ),
    Fault(
        "mask in the kernels: logits outside are not replaced in the backward pass",
        "kernels/gradient.py",
        (("        za = kept(za, keep, o.CLASSES)\n", ""),),
        "tests/test_loss_mask.py::test_objective_is_that_of_the_cropped_problem[triton-4-dice]",
    ),
    Fault(
        "mask in the kernels: class 0 counts voxels outside",
        "kernels/statistics.py",
        (("        seen += _rows(keep.to(tl.int32))\n", "        seen += o.VECTOR\n"),),
        "tests/test_loss_mask.py::test_objective_is_that_of_the_cropped_problem[triton-2-dice]",
    ),
    Fault(
        "ignore_index in the kernels: ignored voxels count in Dice",
        "kernels/dice.py",
        (("        known = known & (t != RULES.ignored)\n", "        known = known\n"),),
        "tests/test_loss_targets.py::test_ignore_index[triton-dice-dtype1]",
    ),
    Fault(
        "labelled: features of another sample",
        "kernels/weighting.py",
        (("fb += sample_offset(member,", "fb += sample_offset(sample,"),),
        "tests/test_loss_targets.py::test_labelled_by_index[triton-False-list]",
    ),
    Fault(
        "mask: Dice counts voxels outside",
        "rplib/dice.py",
        (("        p = p * keep.unsqueeze(1)\n", ""),),
        "tests/test_loss_mask.py::test_objective_is_that_of_the_cropped_problem[torch-2-dice]",
    ),
    Fault(
        "labels: a value beyond the last class passes for background",
        "rplib/targets.py",
        (("    good = (t >= 0) & (t < classes)\n", "    good = t >= 0\n"),),
        "tests/test_loss_targets.py::test_a_label_that_is_no_class[torch-255]",
    ),
    Fault(
        "students: the others get a gradient",
        "rplib/functional.py",
        (("t if k in options.students else t.detach()", "t"),),
        "tests/test_loss_targets.py::test_students_learn_and_the_others_only_teach[torch-2-students0-2]",
    ),
    Fault(
        "labelled: the target's rows in sorted order",
        "rplib/targets.py",
        (("        return Target(target, rows)\n", "        return Target(target, sorted(rows))\n"),),
        "tests/test_loss_targets.py::test_labelled_by_index[torch-False-list]",
    ),
)
