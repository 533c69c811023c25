"""The parts of `data_pipeline.build`: where files come from, who works, what is kept on disk."""
