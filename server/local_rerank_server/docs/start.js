// Starts Swagger UI on the OpenAPI document next to the page.

SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  displayRequestDuration: true,
  tryItOutEnabled: true,
  validatorUrl: null,  // by default the page calls validator.swagger.io
});
