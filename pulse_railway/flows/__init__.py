"""What each verb does, one file a flow, named as the verb or verbs that it serves."""
