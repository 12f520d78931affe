"""How fast it is, beside others: workloads, one driver per engine, rounds in turn, report."""
