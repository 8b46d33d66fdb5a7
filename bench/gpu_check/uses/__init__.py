"""What is built on moves: a pipeline, a move beside compute, weights from job to job. May import what moves."""
