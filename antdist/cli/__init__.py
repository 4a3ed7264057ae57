"""The command line: one verb a stage of the flow."""
