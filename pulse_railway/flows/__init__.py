"""The verbs' flows, a file for each verb or pair of verbs."""
