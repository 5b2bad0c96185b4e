"""The kinds of tasks: one file each; being there is all the registering."""
