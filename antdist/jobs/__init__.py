"""Ray jobs: submit, follow, stop and resume them; fan out one a trial."""
