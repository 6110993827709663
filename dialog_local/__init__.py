"""A phone company, speech and a language model on this machine: the providers' own protocols, without their networks."""
