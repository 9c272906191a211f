"""How priors are made for a whole data file: planned, shared among workers, made and stored."""
