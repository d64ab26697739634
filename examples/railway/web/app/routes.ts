import type { RouteConfig } from "@react-router/dev/routes";
// written by `pulse generate`
import { routes } from "./pulse/routes";

export default [...routes] satisfies RouteConfig;
