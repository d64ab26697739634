"""SECURITY.md: each of its sentences has a test."""

from __future__ import annotations

import ast
import re
import subprocess

from examples import demo
from tests.conftest import ROOT

# how a sentence (or a row of the table) begins -> the tests that show it
SHOWN_BY = {
    "The router is public.": "test_router_metrics.test_only_the_private_network_gets_them",
    "It refuses what request smugglers send": "test_router_faults.test_bad_heads_are_400"
    " test_router_table.test_internal_paths_are_never_forwarded"
    " test_router_limits.test_trailers_are_bounded"
    " test_router_limits.test_pipelined_requests_are_bounded",
    "`PULSE_RAILWAY_INTERNAL_TOKEN` is shared": "test_rotation.step_01_the_token_is_replaced",
    "Who has it can read session counts": "test_rotation.step_02_the_live_versions_go_on"
    " test_rotation.step_04_the_former_one_opens_no_router"
    " test_previews.test_who_reaches_a_preview",
    "After `ensure --rotate` a former token": "test_rotation.step_03_a_new_version_has_the_new_one"
    " test_rotation.step_04_the_former_one_opens_no_router",
    "A verb sends the internal token": "test_custom_domain."
    "test_the_token_is_sent_after_a_maintenance_answer_only"
    " test_custom_domain.test_no_other_answer_gets_it",
    "No custom domain gets it": "test_custom_domain.test_a_custom_domain_gets_no_internal_token"
    " test_custom_domain.test_a_custom_domain_alone",
    "The janitor alone holds": "test_janitor_token.test_what_is_written_is_a_token",
    "The router holds none.": "test_janitor_token.step_01_the_router_has_none",
    "`ensure` and `doctor` warn": "test_janitor_token.step_02_an_accounts_token_is_warned_about",
    "Metrics are off by default": "test_router_metrics.test_they_are_off_by_default"
    " test_router_metrics.test_only_the_private_network_gets_them",
    "They hold deployment ids and counts": "test_router_metrics.test_every_number_is_there",
    "The access log, off by default": "test_router_metrics.test_a_line_is_what_railway_reads",
    "The local Railway and its page": "test_local_page.test_it_is_for_this_machine"
    " test_security_page.test_the_local_railway_listens_on_loopback",
    "Its folder is for its owner alone": "test_local_safety.test_the_folder_is_its_owners_alone"
    " test_local_safety.test_the_folder_is_closed_before_anything_is_written",
    "A folder of another user": "test_local_safety.test_a_folder_of_somebody_else_is_refused"
    " test_local_safety.test_the_commands_refuse_it_in_one_line",
    "Another user of the machine": "test_local_safety.test_local_paths_need_the_key"
    " test_local_safety.test_no_spelling_of_a_local_path_goes_without_the_key"
    " test_local_safety.test_without_a_token_no_upload_is_kept"
    " test_real_cli.test_no_project_token_gets_near_keys",
    "None of them is in a process": "test_local_safety.test_no_secret_is_in_a_process_argument",
    "Another website can do nothing": "test_local_safety.test_another_website_cannot_give_orders"
    " test_local_safety.test_orders_are_json test_local_safety.test_no_page_may_frame_it",
    "An upload there is refused": "test_local_safety.test_a_hostile_upload_is_refused_in_one_line"
    " test_local_safety.test_a_sparse_giant_is_refused test_local_safety.test_a_bomb_is_refused"
    " test_local_safety.test_no_upload_leads_out_of_its_folder"
    " test_local_safety.test_uploads_have_a_limit",
    "An upload whose service": "test_local_safety.test_uploads_of_deleted_services_go",
    "Session data is in Redis": "test_session.test_sessions_are_kept_as_0_3_x_keeps_them",
    "An app that keeps its sessions in the router's": "test_session_redis."
    "test_the_acl_in_the_docs_keeps_an_app_from_the_routing_state"
    " test_session_redis.test_the_acl_in_the_docs_suffices_for_sessions",
    "A text from outside": "test_terminal.test_no_verb_lets_a_text_act_on_the_terminal"
    " test_terminal.test_no_text_acts_on_the_terminal",
    "Secrets are references": "test_baseline.test_no_secret_is_shown"
    " test_secrets.test_every_form_is_redacted test_session_redis.step_03_it_is_kept",
    "| active |": "test_previews.test_other_versions_never_get_a_previews_answer",
    "| canary |": "test_canary.test_the_share_is_within_a_point"
    " test_previews.test_who_reaches_the_other_versions",
    "| pending, held": "test_previews.test_who_reaches_the_other_versions",
    "| preview (": "test_previews.test_who_reaches_a_preview",
    "| retired, deleted |": "test_previews.test_who_reaches_the_other_versions"
    " test_previews.test_a_deleted_preview_is_gone",
    "A preview's key has 256": "test_preview_verbs.step_01_a_preview_is_deployed",
    "It is shown once": "test_preview_verbs.step_01_a_preview_is_deployed",
    "It is in no process argument": "test_preview_verbs.step_01_a_preview_is_deployed",
    "The link's key becomes a cookie": "test_previews."
    "test_the_link_sets_a_cookie_and_leaves_the_address",
    "No backend sees the link.": "test_previews.test_the_link_sets_a_cookie_and_leaves_the_address",
    "Every backend that the browser": "test_previews."
    "test_backends_see_the_cookie_as_they_see_all_others",
    "Without its key a preview": "test_previews."
    "test_without_the_key_the_answer_is_that_of_an_unknown_id"
    " test_previews.test_a_wrong_key_takes_as_long_as_an_unknown_id"
    " test_previews.test_a_request_makes_at_most_one_digest",
    "A preview answers in no other": "test_previews.test_other_versions_never_get_a_previews_answer"
    " test_previews.test_previews_are_no_fallback_and_no_target_of_a_rollback",
    "A preview's answers are": "test_previews.test_who_reaches_a_preview",
    "A preview whose record is lost": "test_previews."
    "test_a_preview_whose_record_is_lost_stays_closed",
    "A record without a valid hash": "test_previews.test_an_invalid_preview_is_opened_by_no_key",
    "After `--evict` no other": "test_preview_verbs.step_10_deploy_evicts_the_old_versions",
}


def sentences() -> list[str]:
    """Return the sentences of the lists, and the rows of the table."""
    text = (ROOT / "SECURITY.md").read_text().partition("What is worth knowing:")[2]
    found = []
    for item in re.findall(r"^- .*(?:\n  .*)*", text, re.M):
        line = " ".join(item[2:].split())
        found += re.split(r"(?<=\.) (?=[A-Z`])", line)
    rows = re.findall(r"^\| .*", text, re.M)
    return found + [row for row in rows[1:] if not row.startswith("| --")]


def test_each_sentence_has_a_test() -> None:
    written = sentences()
    assert len(written) > 30
    for sentence in written:
        assert [key for key in SHOWN_BY if sentence.startswith(key)], sentence
    unused = [key for key in SHOWN_BY if not any(s.startswith(key) for s in written)]
    assert unused == []


def test_the_tests_exist() -> None:
    for names in SHOWN_BY.values():
        for name in names.split():
            file, _, function = name.partition(".")
            tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text())
            functions = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
            assert function in functions, name


def test_the_local_railway_listens_on_loopback(railway: demo.Stage) -> None:
    listed = subprocess.run(["ss", "-ltnHp"], capture_output=True, text=True, check=True).stdout
    own = [line for line in listed.splitlines() if f"pid={railway.process.pid}," in line]
    assert own
    for line in own:
        address = line.split()[3].rpartition(":")[0]
        assert address in ("127.0.0.1", "[::1]"), line
