"""Mistakes in the reference trainer, each with a test that must notice."""

from faults import Fault

TRAINER = (
    Fault(
        "crops: the last offset is never drawn when held out",
        "reference/training/batches.py",
        (("random.integers(spare if self._as_authors else spare + 1)", "random.integers(max(spare, 1))"),),
        "tests/test_reference_batches.py::test_offsets_of_the_crop",
    ),
    Fault(
        "augmentation: never the identity when held out",
        "reference/training/batches.py",
        (("back[axis] ^= self._as_authors or bool(random.integers(2))", "back[axis] ^= True"),),
        "tests/test_reference_batches.py::test_every_symmetry_is_equally_likely_when_held_out",
    ),
    Fault(
        "augmentation: the label is not turned with its image",
        "reference/training/batches.py",
        (
            (
                "                cut(label, crop, patch,",
                "                cut(label, crop._replace(reversed=(False, False)), patch,",
            ),
        ),
        "tests/test_reference_batches.py::test_labelled_samples_come_first_and_labels_fit_their_images",
    ),
    Fault(
        "streams: one generator for labelled and unlabelled crops",
        "reference/training/batches.py",
        (
            (
                "np.random.default_rng([config.seed, index]), self._as",
                "np.random.default_rng([config.seed, len(streams), index]), self._as",
            ),
        ),
        "tests/test_reference_batches.py::test_labelled_only_training_sees_the_same_labelled_crops",
    ),
    Fault(
        "feed: the state is that of the batch ahead",
        "reference/training/feeding.py",
        (
            (
                "        self._state = self._batches.state()\n        self._ahead = self._start()\n",
                "        self._ahead = self._start()\n        self._state = self._batches.state()\n",
            ),
        ),
        "tests/test_reference_survival.py::test_the_feed_is_one_batch_ahead_and_its_state_is_not",
    ),
    Fault(
        "ramp-up counted from 0",
        "reference/training/trainer.py",
        (("rplib.ramp(t - self.ramp_from, config", "rplib.ramp(max(t - 1 - self.ramp_from, 1), config"),),
        "tests/test_reference_train.py::test_metrics_have_one_row_an_iteration",
    ),
    Fault(
        "resumption without the optimiser's momentum",
        "reference/training/trainer.py",
        (('        self.optimiser.load_state_dict(saved["optimiser"])\n', ""),),
        "tests/test_reference_train.py::test_all_that_a_step_depends_on_survives_an_interruption",
    ),
    Fault(
        "resumption without the state of dropout",
        "reference/training/trainer.py",
        (("        torch.set_rng_state(cpu)\n", ""),),
        "tests/test_reference_train.py::test_all_that_a_step_depends_on_survives_an_interruption",
    ),
    Fault(
        "paper protocol: an equal score replaces the best",
        "reference/training/trainer.py",
        (("if mean > self.best_score:", "if mean >= self.best_score:"),),
        "tests/test_reference_train.py::test_paper_keeps_the_first_best_on_the_test_list",
    ),
    Fault(
        "held-out protocol opens the test list",
        "reference/training/trainer.py",
        (
            (
                '    if config.protocol == "paper":\n        validation = load',
                "    if config.protocol:\n        validation = load",
            ),
        ),
        "tests/test_reference_train.py::test_held_out_never_opens_the_test_list",
    ),
    Fault(
        "weights that broke in a step are written",
        "reference/training/trainer.py",
        (("                    self._check_weights(t, batch.names)\n", "                    pass\n"),),
        "tests/test_reference_survival.py::test_weights_that_break_in_a_step_do_not_reach_a_checkpoint",
    ),
    Fault(
        "checkpoints are written over the old one",
        "reference/files.py",
        (("    written = temporary(path)\n", "    written = path\n"),),
        "tests/test_reference_train.py::test_an_interrupted_write_leaves_the_old_file",
    ),
    Fault(
        "several processes: batch statistics of each by itself",
        "reference/training/distributed.py",
        (("        mean = sums[:-1] / count\n", "        mean = x.mean(axes) + 0 * sums[:-1]\n"),),
        "tests/test_reference_ranks.py::test_two_ranks_give_loss_gradients_and_statistics_of_one",
    ),
    Fault(
        "mutual consistency: the own prediction is sharpened, not the other's",
        "reference/training/methods.py",
        (("(p[i] - sharp[j]).square()", "(p[j] - sharp[j]).square()"),),
        "tests/test_reference_methods.py::test_each_method_is_its_formula",
    ),
    Fault(
        "a score of exactly one half is foreground",
        "reference/inference/windows.py",
        (("label = score > 0.5", "label = score >= 0.5"),),
        "tests/test_reference_inference.py::test_exactly_one_half_is_background",
    ),
    Fault(
        "mean of both: of logits",
        "reference/inference/windows.py",
        (
            (
                "found[MEAN] = torch.stack(p).mean(0)",
                "found[MEAN] = torch.stack([z.float() for z in logits]).mean(0).softmax(1)",
            ),
        ),
        "tests/test_reference_inference.py::test_the_mean_of_both_is_of_probabilities_and_not_of_logits",
    ),
    Fault(
        "95HD: the larger of both directions instead of all pooled",
        "reference/evaluation/metrics.py",
        (
            (
                "    pooled = np.concatenate(distances)\n",
                "    pooled = max(distances, key=lambda d: np.percentile(d, 95) if d.size else 0)\n",
            ),
        ),
        "tests/test_reference_metrics.py::test_golden",
    ),
    Fault(
        "ASD: from the truth to the prediction",
        "reference/evaluation/metrics.py",
        (("        asd=_mean(voxel[0]),", "        asd=_mean(voxel[1]),"),),
        "tests/test_reference_metrics.py::test_golden",
    ),
    Fault(
        "an empty prediction has distance 0",
        "reference/evaluation/metrics.py",
        (
            (
                'float(np.percentile(pooled, 95)) if pooled.size else float("nan")',
                "float(np.percentile(pooled, 95)) if pooled.size else 0.0",
            ),
        ),
        "tests/test_reference_metrics.py::test_empty_masks_have_no_distances",
    ),
    Fault(
        "Left Atrium: every value above 0 is the cavity",
        "reference/conversion/left_atrium.py",
        ((".label) == CAVITY)", ".label) > 0)"),),
        "tests/test_reference_convert.py::test_left_atrium_by_hand",
    ),
    Fault(
        "Pancreas-CT: z-score before the crop",
        "reference/conversion/pancreas.py",
        (("crop = z_score(image[x0:x1, y0:y1], source.image)", "crop = z_score(image, source.image)[x0:x1, y0:y1]"),),
        "tests/test_reference_convert.py::test_pancreas_is_cropped_around_the_label",
    ),
    Fault(
        "BraTS: z-score over the background too",
        "reference/conversion/brats.py",
        (("z_score(crop, source.image, crop > 0)", "z_score(crop, source.image)"),),
        "tests/test_reference_convert.py::test_brats_by_hand",
    ),
    Fault(
        "prediction: the header's transforms are lost",
        "reference/datasets/nifti_writing.py",
        (("None if header is None else _of_the_grid(header)", "None"),),
        "tests/test_reference_predict.py::test_a_nifti_file_keeps_its_grid_and_its_header",
    ),
    Fault(
        "shrunk data: the affine's origin stays at the first voxel",
        "reference/conversion/shrink.py",
        (("            first[:3, 3] = (self.by - 1) / 2\n", ""),),
        "tests/test_reference_shrink.py::test_blocks_by_hand",
    ),
    Fault(
        "comparison: a larger distance is better",
        "reference/compare.py",
        (('sign = 1 if metric in ("dice", "jaccard") else -1', "sign = 1"),),
        "tests/test_reference_compare.py::test_by_hand",
    ),
)
