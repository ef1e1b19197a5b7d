"""The decisions: life cycle, templates, teams, quotas, placement. Called by `api`."""
