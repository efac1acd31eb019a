"""The checks behind the feature table, the models they examine, and the table's rows."""
