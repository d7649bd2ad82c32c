"""Many solves: one table and one picture of a multirun; trainings and calibrations that jobs share."""
