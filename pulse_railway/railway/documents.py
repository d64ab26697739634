"""The GraphQL documents that we send. A test checks each against Railway's schema.

Several things are read in one document, and several writes go in one: Railway counts requests.
"""

from __future__ import annotations

PROJECT_TOKEN = """
query ProjectToken {
  projectToken {
    projectId
    environmentId
    project { name }
    environment { name }
  }
}
"""

MY_PROJECTS = """
query MyProjects {
  me {
    workspaces {
      id
      name
      projects(first: 500) {
        edges {
          node { id name environments { edges { node { id name } } } }
        }
      }
    }
  }
  externalWorkspaces {
    id
    name
    projects { id name environments { edges { node { id name } } } }
  }
}
"""

# for workspace tokens, whose `me` is refused
PROJECTS = """
query Projects($workspace: String) {
  projects(workspaceId: $workspace, first: 500) {
    edges {
      node { id name workspaceId environments { edges { node { id name } } } }
    }
  }
}
"""

REGIONS = """
query Regions($project: String) {
  regions(projectId: $project) { name }
}
"""

EXECUTE = """
mutation Execute($instance: String!) {
  deploymentInstanceExecutionCreate(input: { serviceInstanceId: $instance })
}
"""

API_TOKEN = """
query ApiToken {
  apiToken { workspaces { id name } }
}
"""

WORKSPACE_OF = """
query WorkspaceOf($project: String!) {
  project(id: $project) { workspaceId workspace { id name } }
}
"""

ENVIRONMENTS = """
query Environments($project: String!) {
  environments(projectId: $project) { edges { node { id name } } }
}
"""

STACK = """
query Stack($project: String!, $environment: String!) {
  project(id: $project) { services { edges { node { id name } } } }
  environment(id: $environment, projectId: $project) {
    config
    serviceInstances {
      edges {
        node {
          id
          serviceId
          serviceName
          createdAt
          source { image repo }
          numReplicas
          healthcheckPath
          healthcheckTimeout
          overlapSeconds
          drainingSeconds
          startCommand
          cronSchedule
          restartPolicyType
          domains { serviceDomains { domain targetPort } customDomains { domain } }
          latestDeployment { id status statusUpdatedAt createdAt deploymentStopped }
        }
      }
    }
  }
}
"""

# what a person can set on a service; STACK has its region and its limits
SET_BY_HAND = """
query SetByHand($service: String!, $environment: String!) {
  service(id: $service) { tracingEnabled }
  serviceInstance(serviceId: $service, environmentId: $environment) {
    autoInstrumentationEnabled
    ipv6EgressEnabled
  }
  egressGateways(serviceId: $service, environmentId: $environment) { region }
}
"""

RENDERED = """
query Rendered($project: String!, $environment: String!, $service: String!) {
  variablesForServiceDeployment(
    projectId: $project, environmentId: $environment, serviceId: $service
  )
}
"""

LATEST = """
query Latest($project: String!, $environment: String!) {
  environment(id: $environment, projectId: $project) {
    serviceInstances {
      edges { node { serviceId serviceName latestDeployment { id status } } }
    }
  }
}
"""

DEPLOYMENT = """
query Deployment($deployment: String!, $since: DateTime) {
  deployment(id: $deployment) { id status deploymentStopped }
  buildLogs(deploymentId: $deployment, startDate: $since, limit: 500) { timestamp message }
}
"""

STATUS = """
query Status($deployment: String!) {
  deployment(id: $deployment) { id status deploymentStopped }
}
"""

RUNTIME_LOGS = """
query RuntimeLogs($deployment: String!, $since: DateTime, $limit: Int) {
  deployment(id: $deployment) { status }
  deploymentLogs(deploymentId: $deployment, startDate: $since, limit: $limit) {
    timestamp
    message
    severity
  }
}
"""

BUILD_LOGS = """
query BuildLogs($deployment: String!, $since: DateTime, $limit: Int) {
  deployment(id: $deployment) { status }
  buildLogs(deploymentId: $deployment, startDate: $since, limit: $limit) {
    timestamp
    message
    severity
  }
}
"""

PROJECT_TOKENS = """
query ProjectTokens($project: String!) {
  projectTokens(projectId: $project, first: 500) {
    edges { node { id name environmentId } }
  }
}
"""

PROJECT_TOKEN_DELETE = """
mutation ProjectTokenDelete($id: String!) {
  projectTokenDelete(id: $id)
}
"""

PROJECT_TOKEN_CREATE = """
mutation ProjectTokenCreate($input: ProjectTokenCreateInput!) {
  projectTokenCreate(input: $input)
}
"""

TEMPLATE = """
query Template($code: String!) {
  template(code: $code) { id code serializedConfig }
}
"""

TEMPLATE_DEPLOY = """
mutation TemplateDeploy($input: TemplateDeployV2Input!) {
  templateDeployV2(input: $input) { workflowId }
}
"""

SERVICE_CREATE = """
mutation ServiceCreate($input: ServiceCreateInput!) {
  serviceCreate(input: $input) { id }
}
"""

SERVICE_DEPLOY = """
mutation ServiceDeploy($service: String!, $environment: String!) {
  serviceInstanceDeployV2(serviceId: $service, environmentId: $environment)
}
"""

DOMAIN_CREATE = """
mutation DomainCreate($input: ServiceDomainCreateInput!) {
  serviceDomainCreate(input: $input) { domain }
}
"""


def variables_of(count: int) -> str:
    """Return a document that reads the unrendered variables of `count` services: v0, v1, ..."""
    parameters = "".join(f", $s{i}: String!" for i in range(count))
    fields = "\n".join(
        f"  v{i}: variables(projectId: $project, environmentId: $environment,"
        f" serviceId: $s{i}, unrendered: true)"
        for i in range(count)
    )
    return f"query Variables($project: String!, $environment: String!{parameters}) {{\n{fields}\n}}"


def allot(*, limits: bool, gateway: bool) -> str:
    """Return a document that gives a service its limits and its static outbound addresses.

    Its variables: `limits` (ServiceInstanceLimitsUpdateInput), `gateway`
    (EgressGatewayCreateInput), each if it is asked for.
    """
    parameters, fields = [], []
    if limits:
        parameters.append("$limits: ServiceInstanceLimitsUpdateInput!")
        fields.append("  limits: serviceInstanceLimitsUpdate(input: $limits)")
    if gateway:
        parameters.append("$gateway: EgressGatewayCreateInput!")
        fields.append("  gateway: egressGatewayAssociationCreate(input: $gateway) { region }")
    return f"mutation Allot({', '.join(parameters)}) {{\n" + "\n".join(fields) + "\n}"


def configure(
    *,
    variables: int = 0,
    deletions: int = 0,
    settings: int = 0,
    disconnect: int = 0,
    patch: bool = False,
) -> str:
    """Return a document that writes variables, settings and groups of several services.

    Its variables: `v0...` (VariableCollectionUpsertInput), `x0...` (VariableDeleteInput), `s0...`
    with `i0...` (a service id and its ServiceInstanceUpdateInput), `d0...` (ids of services whose
    image or repo is taken off), `patch` (EnvironmentConfig). Mutations of one document run in
    order.
    """
    parameters = ["$environment: String!"] if settings or patch else []
    fields = []
    for i in range(disconnect):
        parameters.append(f"$d{i}: String!")
        fields.append(f"  disconnect{i}: serviceDisconnect(id: $d{i}) {{ id }}")
    for i in range(variables):
        parameters.append(f"$v{i}: VariableCollectionUpsertInput!")
        fields.append(f"  variables{i}: variableCollectionUpsert(input: $v{i})")
    for i in range(deletions):
        parameters.append(f"$x{i}: VariableDeleteInput!")
        fields.append(f"  delete{i}: variableDelete(input: $x{i})")
    for i in range(settings):
        parameters.append(f"$s{i}: String!, $i{i}: ServiceInstanceUpdateInput!")
        fields.append(
            f"  settings{i}: serviceInstanceUpdate("
            f"serviceId: $s{i}, environmentId: $environment, input: $i{i})"
        )
    if patch:
        parameters.append("$patch: EnvironmentConfig")
        fields.append(
            "  patch: environmentPatchCommit(environmentId: $environment, patch: $patch,"
            ' commitMessage: "pulse-railway ensure")'
        )
    return f"mutation Configure({', '.join(parameters)}) {{\n" + "\n".join(fields) + "\n}"
