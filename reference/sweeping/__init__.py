"""Many trainings at once: recipes x settings x seeds, run, scored and compared."""
