"""The requirements, sentence by sentence, and the tests that check them.

A key is a section, with the numbers of its sentences. `tests/test_requirements.py` counts the
sentences, if the text is available, and checks that each test exists. The wording is ours.
"""

from __future__ import annotations

SENTENCES: dict[str, list[tuple[str, str, list[str]]]] = {
    "pulse-railway": [
        ("1-3", "one router, one service a deployment, HTTP and WebSockets by affinity", [
            "test_story.py::test_two_deploys_of_the_example",
            "test_tunnel.py::test_who_gets_a_handshake",
            "test_router_table.py::test_known_affinity_gets_that_deployment_whatever_its_state",
        ]),
        ("4-6", "which token goes where, and the CLI's login where there is none", [
            "test_tokens.py::test_the_order",
            "test_tokens.py::test_each_kind_opens_what_it_should",
            "test_tokens.py::test_login_files",
        ]),
    ],
    "Quick Start": [
        ("1-3 9 13", "scaffold and ensure create the baseline of an empty project", [
            "test_verbs.py::baseline",
            "test_first_deploy.py::test_what_the_pages_say",
        ]),
        ("4 5 36 49", "deploy uploads the source and Railway builds it", [
            "test_verbs.py::step_03_deploy_with_variables",
            "test_up.py::test_a_large_upload_gets_its_time",
        ]),
        ("6 33-35 50", "an image repository, by flag or plugin: docker builds and pushes", [
            "test_baseline.py::test_image_mode",
        ]),
        ("7-8", "redeploy: the active one, or the one named", ["test_verbs.py::step_08_redeploy"]),
        ("10", "names come from the plugin", ["test_baseline.py::test_service_prefix"]),
        ("11 46-48", "variables live on the env service, and are referred to", [
            "test_verbs.py::step_03_deploy_with_variables",
        ]),
        ("12 16 22 45", "a partial baseline is refused by each verb, and says what to do", [
            "test_failures.py::test_a_partial_baseline_is_refused",
            "test_bad_input.py::test_no_baseline",
        ]),
        ("14-15", "ensure sets what is managed, and moves services into the router's group", [
            "test_verbs.py::step_02_ensure_changes_nothing_then_only_what_differs",
            "test_baseline.py::test_ensure_restores_groups_and_managed_settings",
        ]),
        ("17-18 23 37-40", "app, plugin, Dockerfile, web root, context, what overrides", [
            "test_bad_input.py::test_apps_that_cannot_be_deployed",
            "test_verbs.py::step_16_another_command_line_of_0_3",
            "test_first_deploy.py::test_what_the_pages_say",
        ]),
        ("19-20", "scaffold: the template, on an empty project only", [
            "test_verbs.py::step_01_scaffold_refuses_a_second_time",
            "test_baseline.py::test_ensure_restores_groups_and_managed_settings",
        ]),
        ("21 41-42", "Redis in the project or an external one; no stack is switched", [
            "test_baseline.py::test_external_redis",
            "test_baseline.py::test_a_projects_redis_cannot_be_replaced_by_an_external_one",
        ]),
        ("24-29", "the target: by name or id, flags over plugin over what the token says", [
            "test_tokens.py::test_flags_before_plugin_before_environment",
            "test_tokens.py::test_a_name_that_several_have",
            "test_bad_input.py::test_names_and_ids_are_not_mixed",
            "test_bad_input.py::test_unknown_names",
        ]),
        ("30-32", "the deployment's name: flag, plugin, prod", [
            "test_habits.py::test_a_name_is_kept_with_its_service",
            "test_verbs.py::step_16_another_command_line_of_0_3",
            "test_requirements.py::test_where_a_name_comes_from",
        ]),
        ("43-44", "deploy repairs nothing", [
            "test_bad_input.py::test_no_baseline",
            "test_failures.py::test_nothing_is_created_without_an_answer_of_the_router",
        ]),
    ],
    "Model": [
        ("1-5", "router, env, Redis, janitor on cron, one service a deployment", [
            "test_baseline.py::test_ensure_restores_groups_and_managed_settings",
            "test_baseline.py::test_external_redis",
        ]),
        ("6 9", "the state is in Redis", [
            "test_state_machine.py::Life",
            "test_lost_state.py::test_the_state_survives_a_redis_that_restarts_empty",
        ]),
        ("7", "affinity by query, then by header", [
            "test_router_table.py::test_query_wins_over_header",
        ]),
        ("8", "WebSockets go to the same backend", ["test_tunnel.py::test_who_gets_a_handshake"]),
        ("10", "registered before the router is asked for it", [
            "test_failures.py::test_a_deploy_that_fails_leaves_nothing",
        ]),
        ("11", "tabs are told to reload before a deployment goes", [
            "test_janitor.py::test_the_tabs_are_told_whoever_removes_it",
        ]),
        ("12", "a socket with a stale affinity gets the active one, which has it reload", [
            "test_tunnel.py::test_who_gets_a_handshake",
            "test_browser.py::test_a_tab_lives_through_a_deploy",
        ]),
        ("13", "the router knows Redis, not Railway's API", [
            "test_contract.py::test_the_runtime_imports_nothing_of_the_package",
            "test_router_faults.py::test_a_redis_outage_fails_no_request",
        ]),
        ("14", "control commands inside the router, no public route", [
            "test_router_table.py::test_internal_paths_are_never_forwarded",
            "test_verbs.py::step_15_control_and_janitor_fail_outside_railway",
        ]),
    ],
    "Runtime": [
        ("1-3", "a backend knows its id, meta says it, internal endpoints need the token", [
            "test_plugin.py::test_strangers_are_told_nothing",
            "test_story.py::test_two_deploys_of_the_example",
            "test_verbs.py::step_03_deploy_with_variables",
        ]),
        ("4-6", "RailwaySessionStore: its Redis, only where the app has it", [
            "test_session.py::test_sessions_are_kept_as_0_3_x_keeps_them",
            "test_verbs.py::step_03_deploy_with_variables",
        ]),
        ("7-12", "register, verify by affinity, promote; the one before drains", [
            "test_verbs.py::step_05_a_pending_deployment_and_promote",
            "test_pages.py::test_a_page_that_does_not_come_up",
            "test_unreliable_ssh.py::test_no_active_deployment_is_lost",
        ]),
        ("13-15", "the janitor asks for sessions, deletes what is empty, forces what is old", [
            "test_janitor.py::test_draining_deployments",
            "test_verbs.py::step_12_the_janitor_keeps_what_is_used_and_forces_what_is_old",
        ]),
        ("16-17", "the janitor is a cron service, at most every five minutes", [
            "test_baseline.py::test_ensure_restores_groups_and_managed_settings",
            "test_bad_input.py::test_values_that_do_not_fit",
        ]),
        ("18-19 21", "janitor run: in its service only", [
            "test_verbs.py::step_15_control_and_janitor_fail_outside_railway",
            "test_verbs.py::step_12_the_janitor_keeps_what_is_used_and_forces_what_is_old",
        ]),
        ("20", "custom service names reach the janitor", ["test_baseline.py::test_service_prefix"]),
        ("22-23", "redeploy, with the target by flags", [
            "test_verbs.py::step_08_redeploy",
            "test_verbs.py::step_16_another_command_line_of_0_3",
        ]),
        ("24-25", "remove by the name; several are listed and none is removed", [
            "test_habits.py::test_a_name_is_compared_whole",
            "test_verbs.py::step_09_delete_and_remove",
        ]),
    ],
    "Notes": [
        ("1-2", "one backend replica, unless told otherwise", [
            "test_requirements.py::test_one_backend_replica",
        ]),
        ("3", "several routers agree", [
            "test_canary.py::test_every_router_agrees",
            "test_chaos.py::test_nobody_notices",
        ]),
        ("4-5", "a drained deployment stays healthy; the janitor removes it", [
            "test_verbs.py::step_12_the_janitor_keeps_what_is_used_and_forces_what_is_old",
        ]),
    ],
}  # fmt: skip
